"""Replicas in processes of their own, watched and disturbed: what each holds, is given, and runs.

What runs inside a replica must be importable there, so it is here and not in a notebook. Invariant: only what
the functions say is changed in an engine, and after `streamed` its balancer is the one that it had.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from course_lib.engine.balancer import Balancer
from course_lib.engine.coordinator import AGREE_EVERY
from course_lib.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from course_lib import LLM

SETTLES_S = 60.0  # how long a wave may take to end on a busy machine


@dataclass(frozen=True, slots=True)
class Holding:
    """What one replica is."""

    process: int
    threads: int
    weights: int  # numbers, not bytes


def holding(runner: Any) -> Holding:
    """For `llm.collective_rpc`."""
    import torch

    weights = sum(one.numel() for one in runner.model.parameters())
    return Holding(os.getpid(), torch.get_num_threads(), weights)


def greedy(num_tokens: int) -> SamplingParams:
    """The most likely `num_tokens` tokens, told as they come."""
    return SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )


# ---- who is given what ------------------------------------------------------------------------------


@dataclass(slots=True)
class Stream:
    """What became of requests: of each its replica, its length and the seconds until its end."""

    seconds: float = 0.0
    replica: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def tokens_of(self, replica: int) -> int:
        """Tokens that this replica wrote."""
        return sum(count for count, own in zip(self.tokens, self.replica, strict=True) if own == replica)


def streamed(llm: LLM, jobs: Sequence[tuple[list[int], int]], at_once: int, policy: str) -> Stream:
    """Serve (prompt, tokens to write) in order; a request is sent when fewer than `at_once` are under way."""
    engine, core = llm.llm_engine, llm.llm_engine.core
    with _balancing(core, policy):
        stream, start = Stream(ended=[0.0] * len(jobs)), time.perf_counter()
        while len(stream.replica) < len(jobs) or engine.has_unfinished_requests():
            while len(stream.replica) < len(jobs) and engine.get_num_unfinished_requests() < at_once:
                number = len(stream.replica)
                prompt, length = jobs[number]
                before = list(core.balancer.num_assigned)
                engine.add_request(str(number), prompt, greedy(length))
                after = core.balancer.num_assigned
                stream.replica.append(next(i for i, count in enumerate(after) if count > before[i]))
                stream.tokens.append(length)
            for output in engine.step():
                if output.finished:
                    stream.ended[int(output.request_id)] = time.perf_counter() - start
        stream.seconds = time.perf_counter() - start
    return stream


@contextmanager
def _balancing(core: Any, policy: str) -> Iterator[None]:
    before = core.balancer
    core.balancer = Balancer(len(before.num_assigned), policy)
    for replica in core.balancer.loads.keys() - before.loads.keys():
        core.balancer.remove(replica)
    try:
        yield
    finally:
        for replica in before.loads.keys() - core.balancer.loads.keys():
            before.remove(replica)
        core.balancer = before


@contextmanager
def watched(llm: LLM) -> Iterator[dict[str, list[tuple[float, int]]]]:
    """Inside the block, fill a dictionary: request -> (second, replica) of each of its tokens, in order.

    What is unfinished when the block is left, because it raised, is aborted.
    """
    engine, core, start = llm.llm_engine, llm.llm_engine.core, time.perf_counter()
    moments: dict[str, list[tuple[float, int]]] = {}
    take_news = core._take_news

    def take_and_note(replica: int, news: Any) -> None:
        now = time.perf_counter() - start
        for output in news.outputs:
            name = output.request_id.split("#")[0]
            moments.setdefault(name, []).extend((now, replica) for _ in output.new_token_ids)
        take_news(replica, news)

    core._take_news = take_and_note
    try:
        yield moments
    finally:
        del core._take_news
        engine.abort_request(list(engine.frontend.output_processor.live))


def kill(llm: LLM, replica: int) -> None:
    """End this replica's process as the kernel does when memory runs out: at once, wherever it is.

    Raises RuntimeError if it is dead already.
    """
    link = llm.llm_engine.core.replicas.links.get(replica)
    if link is None:
        raise RuntimeError(
            f"replica {replica} is dead already: for new replicas, run the cell again that made this LLM"
        )
    os.kill(int(link.name.removeprefix("process ")), signal.SIGKILL)


# ---- who ran which pass -----------------------------------------------------------------------------


def log_passes(runner: Any) -> None:
    """From now on keep, for each forward pass, how many tokens it was given: 0 for a dummy pass. For
    `llm.collective_rpc`."""
    if hasattr(runner, "pass_log"):
        return
    runner.pass_log = []
    execute, dummy = runner.execute_model, runner.execute_dummy_batch

    def logged_execute(plan: Any, *args: Any, **kwargs: Any) -> Any:
        if plan.total_num_scheduled_tokens:
            runner.pass_log.append(plan.total_num_scheduled_tokens)
        return execute(plan, *args, **kwargs)

    def logged_dummy() -> None:
        runner.pass_log.append(0)
        dummy()

    runner.execute_model, runner.execute_dummy_batch = logged_execute, logged_dummy


def passes_so_far(runner: Any) -> list[int]:
    """What was logged. For `llm.collective_rpc`."""
    return runner.pass_log


def forget_passes(runner: Any) -> None:
    """For `llm.collective_rpc`."""
    runner.pass_log.clear()


def passes_of_wave(llm: LLM) -> list[list[int]]:
    """By replica, the tokens of each pass since `forget_passes`; waits until the wave is over.

    Raises TimeoutError if it does not end.
    """
    deadline = time.monotonic() + SETTLES_S
    while time.monotonic() < deadline:
        logs = llm.collective_rpc(passes_so_far)
        lengths = {len(log) for log in logs}
        at_rest = lengths == {len(logs[0])} and len(logs[0]) % AGREE_EVERY == 0
        if at_rest and logs[0] and not any(log[-1] for log in logs):
            time.sleep(0.1)
            if llm.collective_rpc(passes_so_far) == logs:
                return logs
        time.sleep(0.02)
    raise TimeoutError(f"the replicas are still running passes after {SETTLES_S:.0f} s")
