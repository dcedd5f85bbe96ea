"""Ranks that schedule for themselves: equal plans pass, and the first difference is named."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from course_lib.core.messages import CachedRequestData, ModelRunnerOutput, NewRequestData, SchedulerOutput
from course_lib.errors import RankDivergenceError, WorkerDiedError
from course_lib.executor.lock_step import LockStep
from course_lib.parallel.group import PeerLostError
from course_lib.sampling_params import SamplingParams


class _Meeting:
    """Threads in the place of ranks."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=10)
        self.values: list[Any] = [None] * size

    def run(self, steps: Callable[[int, LockStep], None]) -> list[BaseException | None]:
        """`steps` on every rank; what each raised."""
        errors: list[BaseException | None] = [None] * len(self.values)

        def rank(number: int) -> None:
            try:
                steps(number, LockStep(_Rank(self, number)))
            except BaseException as error:
                errors[number] = error

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(self.values))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


class _Rank:
    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self._meeting = rank, meeting

    def all_gather_object(self, value: Any) -> list[Any]:
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        everybody = list(self._meeting.values)
        self._meeting.barrier.wait()
        return everybody


def plan(counts: dict[str, int], *, new: tuple[str, ...] = (), ended: tuple[str, ...] = (), **params: Any) -> Any:
    arrivals = [NewRequestData(one, [1, 2, 3], [], SamplingParams(**params), [7], 0) for one in new]
    known = [one for one in counts if one not in new]
    cached = CachedRequestData(known, [[] for _ in known], [3 for _ in known])
    return SchedulerOutput(arrivals, cached, counts, sum(counts.values()), set(), set(ended))


@pytest.mark.parametrize(
    ("usual", "odd", "says"),
    [
        (plan({"3": 8}), plan({"3": 16}), "rank {odd} schedules for request 3 16 tokens, rank {usual} 8 tokens"),
        (plan({"3": 8}), plan({"3": 8, "4": 1}), "rank {odd} schedules for request 4 1 tokens, rank {usual} nothing"),
        (plan({"3": 1, "4": 1}), plan({"4": 1, "3": 1}), "schedules in this order 4, 3, rank {usual} 3, 4"),
        (plan({}, ended=("b", "a")), plan({}, ended=("a",)), "rank {odd} ends a, rank {usual} a, b"),
        (plan({"3": 3}, new=("3",)), plan({"3": 3}, new=("3",), seed=5), "for request 3 seed 5, rank {usual} None"),
    ],
)
@pytest.mark.parametrize("odd_rank", [0, 1, 2])
def test_a_rank_that_plans_otherwise_is_named(usual: Any, odd: Any, says: str, odd_rank: int) -> None:
    def steps(rank: int, lock_step: LockStep) -> None:
        lock_step.agree(plan({"1": 4}, new=("1",)))
        lock_step.note(ModelRunnerOutput(["1"], [[9]]))
        lock_step.agree(odd if rank == odd_rank else usual)

    usual_rank = 1 if odd_rank == 0 else 0
    expected = says.format(odd=odd_rank, usual=usual_rank)
    for error in _Meeting(3).run(steps):
        assert isinstance(error, RankDivergenceError) and expected in str(error)
        assert str(error).startswith(f"rank {odd_rank} differs from rank {usual_rank} before step 2:")


def test_equal_ranks_pass_whatever_the_order_in_their_sets() -> None:
    def steps(rank: int, lock_step: LockStep) -> None:
        ended = ("a", "b", "c") if rank else ("c", "b", "a")
        for _ in range(3):
            lock_step.agree(plan({"x": 2}, ended=ended, logits_processors=[lambda ids, logits: logits]))
            lock_step.note(ModelRunnerOutput(["x"], [[5]]))

    assert _Meeting(2).run(steps) == [None, None]


def test_a_token_sampled_otherwise_is_named_with_its_step() -> None:
    def steps(rank: int, lock_step: LockStep) -> None:
        lock_step.agree(plan({"x": 2, "y": 1}))
        lock_step.note(ModelRunnerOutput(["x", "y"], [[5], [6 + rank]]))
        lock_step.agree(plan({"x": 1, "y": 1}))

    for error in _Meeting(2).run(steps):
        assert "rank 1 sampled in step 1 for request y [7], rank 0 [6]" in str(error)


def test_what_an_interrupted_step_has_sampled_is_not_compared() -> None:
    def steps(rank: int, lock_step: LockStep) -> None:
        if rank:
            lock_step.note(ModelRunnerOutput(["x"], [[5]]))
        lock_step.reset()
        lock_step.agree(plan({"x": 1}))

    assert _Meeting(2).run(steps) == [None, None]


def test_a_rank_that_is_left_alone_says_so() -> None:
    class Deserted:
        rank = 0

        def all_gather_object(self, value: Any) -> list[Any]:
            raise PeerLostError("closed")

    with pytest.raises(WorkerDiedError, match="rank 0 is alone in step 1: another rank has ended"):
        LockStep(Deserted()).agree(plan({"x": 1}))
