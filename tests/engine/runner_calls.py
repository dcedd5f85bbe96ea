"""What tests have runners in other processes do: functions in a module that those import, and that imports nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def break_model(runner: Any) -> None:
    """Have every step fail."""

    def fail(*args: object) -> None:
        raise ArithmeticError("the model broke")

    runner.intact, runner.model.forward = runner.model.forward, fail


def mend_model(runner: Any) -> None:
    """Undo `break_model`."""
    runner.model.forward = runner.intact


def count_passes(runner: Any) -> None:
    """Count forward passes from now on: with tokens, and without."""
    runner.num_passes = [0, 0]

    def counting(index: int, run: Callable) -> Callable:
        def counted(*args: Any, **more: Any) -> Any:
            runner.num_passes[index] += 1
            return run(*args, **more)

        return counted

    for index, name in enumerate(("forward", "forward_without_tokens")):
        setattr(runner.model, name, counting(index, getattr(runner.model, name)))


def num_passes(runner: Any) -> list[int]:
    """What `count_passes` has counted."""
    return runner.num_passes
