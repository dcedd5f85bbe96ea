"""Workers that fail, are killed, crash or hang; parents that are killed. One clear error, and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from course_lib import LLM, EngineArgs
from course_lib.errors import WorkerDiedError
from tests.executor import sabotage
from tests.executor.requests import tokens


@pytest.mark.parametrize(
    ("deed", "says", "traceback"),
    [
        ("raise", "failed with ArithmeticError: out of numbers", "in sabotaged"),
        ("kill", "was killed by SIGKILL", None),
        ("crash", "was killed by SIGSEGV", "in sabotaged"),
        ("hang", "hangs: it has not answered within 1 s (environment variable VLLM_EXECUTE_MODEL", "in sabotaged"),
    ],
)
def test_a_rank_that_is_lost_in_a_step(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, nothing_left: None, deed: str, says: str,
    traceback: str | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "1")
    llm = make_llm(tensor_parallel_size=2)
    executor = llm.llm_engine.core.executor
    executor.check_health()
    pid = llm.collective_rpc(sabotage.pid)[1]
    llm.collective_rpc(sabotage.step_does, args=(1, deed))
    started = time.monotonic()
    with pytest.raises(WorkerDiedError) as caught:
        tokens(llm)
    assert time.monotonic() - started < 4
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"worker rank 1 (Worker_TP1, pid {pid}) {says}")
    assert "; this happened during step 1. The engine has stopped" in first and "rank 0" not in first
    if traceback is None:
        assert not rest
    else:
        assert rest[0] == f"The last traceback of worker rank 1 (Worker_TP1, pid {pid}):"
        assert any(traceback in line for line in rest)
    for again in (lambda: tokens(llm), executor.check_health, lambda: llm.collective_rpc(sabotage.pid)):
        with pytest.raises(WorkerDiedError) as caught:
            again()
        assert str(caught.value).startswith(first)


def test_a_pipeline_and_a_stage_of_it_that_ends_between_steps(
    make_llm: Callable[..., LLM], expected: list[list[int]], nothing_left: None
) -> None:
    llm = make_llm(pipeline_parallel_size=2)
    assert tokens(llm) == expected
    executor = llm.llm_engine.core.executor
    pid = llm.collective_rpc(sabotage.pid)[0]
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 5
    with pytest.raises(WorkerDiedError, match=f"pid {pid}.* was killed by SIGTERM"):
        while time.monotonic() < deadline:
            executor.check_health()
    with pytest.raises(WorkerDiedError, match=f"pid {pid}.* was killed by SIGTERM; this happened during step"):
        tokens(llm)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_limit_must_be_one(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", given)
    with pytest.raises(ValueError, match=f"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS='{given}' .* seconds above 0"):
        EngineArgs(**settings).create_engine_config()


PARENT = """
import dataclasses, os, pickle, signal, sys
from pathlib import Path
from course_lib import LLMEngine
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.layout import ParallelLayout
from tests.executor import sabotage
from tests.executor.requests import tokens

config = pickle.loads(Path(sys.argv[1]).read_bytes())
engine = LLMEngine(dataclasses.replace(config, parallel=ParallelConfig(ParallelLayout(2), "mp", False)))
tokens(engine)
print(*engine.core.collective_rpc(sabotage.pid), flush=True)
engine.core.collective_rpc(sabotage.speak, args=("wörd",))
engine.core.collective_rpc(sabotage.step_does, args=(1, "hang"))
child = os.fork()  # holds a copy of whatever the parent holds
if child == 0:
    os.close(1)
    signal.pause()
print(child, flush=True)
tokens(engine)
"""


def test_workers_end_when_their_parent_is_killed(config_file: Path, tmp_path: Path) -> None:
    """In the middle of a step, with one worker asleep and the other in a collective. And what a worker prints goes to
    the parent's standard error, behind its name; else there is nothing."""
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else None
    errors = tmp_path / "errors"
    with errors.open("w") as sink:
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(config_file)], stdout=subprocess.PIPE, stderr=sink, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        workers = [psutil.Process(pid) for pid in pids]
        child = int(parent.stdout.readline())
        time.sleep(0.3)
        assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=5)
    os.kill(child, signal.SIGKILL)
    # In a container nobody may collect the dead.
    assert [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE] == []
    assert before is None or set(shared.iterdir()) == before
    said = [f"(Worker_TP{rank} pid={pid}) {text}" for rank, pid in enumerate(pids) for text in ("wörd", "wörd!")]
    assert sorted(errors.read_text(encoding="utf-8").splitlines()) == said
