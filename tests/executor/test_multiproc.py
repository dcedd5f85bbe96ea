"""Worker processes that work: equal tokens, calls of runners, interrupts, what they print and how they end."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from course_lib import LLM, SamplingParams
from course_lib.errors import CorruptModelError, EngineDeadError
from tests.executor import sabotage
from tests.executor.conftest import holdings
from tests.executor.requests import tokens


@pytest.fixture(scope="module")
def two_ranks(make_llm: Callable[..., LLM], settled: None) -> Iterator[LLM]:
    """Tensor parallel, shared by the tests that leave it whole."""
    before = holdings()
    llm = make_llm(tensor_parallel_size=2)
    yield llm
    llm.llm_engine.core.shutdown()
    with pytest.raises(EngineDeadError, match="was shut down"):
        llm.collective_rpc(sabotage.pid)
    assert holdings() == before


def test_tensor_parallel_answers_as_one_process_does(two_ranks: LLM, expected: list[list[int]]) -> None:
    assert tokens(two_ranks) == expected
    assert two_ranks.collective_rpc(sabotage.ranks) == [(0, 0), (0, 1)]
    seeded = SamplingParams(temperature=1, seed=3, max_tokens=8, detokenize=False)
    assert tokens(two_ranks, seeded) == tokens(two_ranks, seeded)


def test_two_by_two_ranks_answer_as_one_process_does(
    make_llm: Callable[..., LLM], expected: list[list[int]], nothing_left: None
) -> None:
    llm = make_llm(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert llm.llm_engine.core.executor.max_concurrent_steps == 2
    assert tokens(llm) == expected
    assert llm.collective_rpc(sabotage.ranks) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    started = [psutil.Process(pid) for pid in llm.collective_rpc(sabotage.pid)]
    del llm  # forgotten, not shut down
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []


def test_a_plan_too_large_for_the_ring(two_ranks: LLM) -> None:
    """Messages that travel in a file of their own, between others that do not."""
    megabytes = [bytes([number]) * (3 << 20) for number in range(3)]
    for value in (*megabytes, b"x", b"".join(megabytes)):
        assert two_ranks.collective_rpc(sabotage.give_back, args=(value,)) == [value, value]


def test_calls_of_runners(two_ranks: LLM, expected: list[list[int]]) -> None:
    pids = two_ranks.collective_rpc(sabotage.pid)
    assert len({*pids, os.getpid()}) == 3
    assert two_ranks.collective_rpc(sabotage.threads) == [(1, False)] * 2  # and none has loaded transformers
    with pytest.raises(LookupError, match="nothing there") as caught:
        two_ranks.collective_rpc(sabotage.fail_here, args=(1,))
    assert f"raised by worker rank 1 (Worker_TP1, pid {pids[1]})" in caught.value.__notes__[0]
    with pytest.raises(ValueError, match="no method 'nonsense'"):
        two_ranks.collective_rpc("nonsense")
    with pytest.raises(ValueError, match=r"collective_rpc: other processes can only be sent what they can import"):
        two_ranks.collective_rpc(lambda runner: None)
    params = SamplingParams(logits_processors=[lambda ids, logits: logits], detokenize=False)
    with pytest.raises(ValueError, match=r"logits_processors: other processes .* a \.py file"):
        tokens(two_ranks, params)
    assert tokens(two_ranks) == expected


def test_ctrl_c_ends_the_step_and_not_the_engine(two_ranks: LLM, expected: list[list[int]]) -> None:
    pids = two_ranks.collective_rpc(sabotage.pid)
    two_ranks.collective_rpc(sabotage.step_does, args=(1, "slow"))
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        tokens(two_ranks)
    two_ranks.collective_rpc(sabotage.heal)
    for pid in pids:
        os.kill(pid, signal.SIGINT)  # not for them
    assert tokens(two_ranks) == expected and two_ranks.collective_rpc(sabotage.pid) == pids


@pytest.mark.parametrize(("target", "method"), [("worker", "notify"), ("executor", "_take_in")])
def test_ctrl_c_between_two_workers(
    two_ranks: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, target: str, method: str
) -> None:
    """A call that one worker was sent must reach the other; an answer that was received must be taken in."""
    executor = two_ranks.llm_engine.core.executor
    owner = executor if target == "executor" else executor._workers[0]
    original = getattr(owner, method)
    pressed = []

    def pressing(*arguments: Any) -> None:
        if len(pressed) < 1:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        original(*arguments)

    monkeypatch.setattr(owner, method, pressing)
    with pytest.raises(KeyboardInterrupt):
        tokens(two_ranks)
    assert pressed and tokens(two_ranks) == expected


def test_ctrl_c_at_any_moment(two_ranks: LLM, expected: list[list[int]]) -> None:
    draw = random.Random(0)
    interrupts = 0
    for _ in range(20):
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.001, 0.03))
        previous = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        try:
            tokens(two_ranks)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    assert interrupts > 3
    assert tokens(two_ranks) == expected


def test_what_a_rank_raises_while_loading_is_raised_here(
    make_llm: Callable[..., LLM], tmp_path: Path, wide_model_path: Path, nothing_left: None
) -> None:
    folder = shutil.copytree(wide_model_path, tmp_path / "model")
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CorruptModelError, match=re.escape(str(file))) as caught:
        make_llm(model=str(folder), tensor_parallel_size=2)
    assert "raised by worker rank" in caught.value.__notes__[0]


def test_the_least_number_of_blocks_counts(two_ranks: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = two_ranks.llm_engine.core.executor
    monkeypatch.setattr(executor, "_call_all", lambda method: {"determine_num_blocks": [7, 5]}[method])
    assert executor.determine_num_blocks() == 5
