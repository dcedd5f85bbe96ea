"""Ray actors as ranks, in a Ray on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from course_lib import LLM
from course_lib.errors import SetupError, WorkerDiedError
from tests.executor import sabotage
from tests.executor.requests import tokens


def test_without_ray_there_is_a_sentence(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SetupError, match='"ray" needs Ray, which is not installed here'):
        make_llm(distributed_executor_backend="ray")


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from course_lib.entrypoints.ray_local import start_local_ray

    start_local_ray(2)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray's own settings
def test_ranks_in_actors(local_ray: Any, make_llm: Callable[..., LLM], expected: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="8 ranks need a CPU each, and Ray has 2"):
        make_llm(tensor_parallel_size=8, distributed_executor_backend="ray")
    llm = make_llm(tensor_parallel_size=2, distributed_executor_backend="ray")
    assert tokens(llm) == expected
    assert llm.collective_rpc(sabotage.ranks) == [(0, 0), (0, 1)]
    with pytest.raises(LookupError, match="nothing there"):
        llm.collective_rpc(sabotage.fail_here, args=(1,))
    large = bytes(1 << 20)
    assert llm.collective_rpc(sabotage.give_back, args=(large,)) == [large, large]
    first, second = llm.collective_rpc(sabotage.pid)

    executor = llm.llm_engine.core.executor
    executor.step_time_limit_s = 1.0
    llm.collective_rpc(sabotage.step_does, args=(1, "hang"))
    hangs = rf"^worker rank 1 \(Worker_TP1, pid {second} on .*\) hangs: "
    with pytest.raises(WorkerDiedError, match=hangs) as caught:
        tokens(llm)
    assert "in sabotaged" in str(caught.value)
    assert not _alive(first) and not _alive(second)

    llm = make_llm(pipeline_parallel_size=2, distributed_executor_backend="ray")
    assert tokens(llm) == expected
    first, second = llm.collective_rpc(sabotage.pid)
    os.kill(first, signal.SIGKILL)
    ended = rf"^worker rank 0 \(Worker_PP0, pid {first} on .*\) has ended \(The actor"
    with pytest.raises(WorkerDiedError, match=ended):
        tokens(llm)
    assert not _alive(second)


def _alive(pid: int) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        process.wait(timeout=10)
    except psutil.NoSuchProcess:
        return False
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
