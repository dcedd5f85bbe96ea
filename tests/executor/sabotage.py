"""What tests have worker processes do: functions that a worker imports by name."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from typing import Any


def pid(runner: Any) -> int:
    return os.getpid()


def ranks(runner: Any) -> tuple[int, int]:
    return runner.parallel.pipeline.rank, runner.parallel.tensor.rank


def threads(runner: Any) -> tuple[int, bool]:
    import torch

    return torch.get_num_threads(), "transformers" in sys.modules


def speak(runner: Any, text: str) -> None:
    print(text)
    print(text, end="", file=sys.stderr)
    print("!", file=sys.stderr)


def fail_here(runner: Any, tensor_rank: int) -> str:
    if runner.parallel.tensor.rank == tensor_rank:
        raise LookupError("nothing there")
    return "fine"


def give_back(runner: Any, value: Any) -> Any:
    return value


def step_does(runner: Any, tensor_rank: int, deed: str) -> None:
    """From now on each step of one rank ends in `deed`: "raise", "kill", "crash", "hang"; or is "slow"."""
    if runner.parallel.tensor.rank != tensor_rank:
        return
    execute = runner.execute_model

    def sabotaged(scheduled: Any) -> Any:
        if deed == "raise":
            raise ArithmeticError("out of numbers")
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "crash":
            ctypes.string_at(0)
        if deed == "hang":
            time.sleep(1000)
        time.sleep(0.2)
        return execute(scheduled)

    runner.execute_model = sabotaged


def heal(runner: Any) -> None:
    vars(runner).pop("execute_model", None)
