"""Ranks for lessons: processes under torchrun that take functions, and ranks played in turns."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from course_lib.teaching.recording.ranks import Ranks, RanksError, torchrun
from course_lib.teaching.recording.turns import OutOfStepError, in_turns


def remember(value):
    global kept
    import os

    kept = value * (rank + 1)  # noqa: F821 `rank` is there on the rank
    print("kept", kept)
    return os.getpid()


def recall():
    return rank, world_size, kept  # noqa: F821


def fail_on_one():
    if rank == 1:  # noqa: F821
        raise ZeroDivisionError("one of two")
    import time

    time.sleep(60)


def gone(pid: int) -> bool:
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def two() -> Ranks:
    ranks = torchrun(2)
    yield ranks
    ranks.close()


@pytest.mark.slow
def test_functions_share_a_namespace_and_a_failure_ends_all_ranks(two: Ranks, capsys: pytest.CaptureFixture) -> None:
    pids = two.call(remember, 5)
    assert sorted(capsys.readouterr().out.splitlines()) == ["rank 0 | kept 5", "rank 1 | kept 10"]
    assert two.call(recall) == [(0, 2, 5), (1, 2, 10)]
    with pytest.raises(RanksError, match="(?s)on rank 1 of 2:.*one of two"):
        two.call(fail_on_one)
    assert all(gone(pid) for pid in pids)
    with pytest.raises(RanksError, match="cell with torchrun"):
        two.call(recall)


@pytest.mark.slow
def test_a_call_that_takes_too_long_names_the_ranks(two: Ranks) -> None:
    with pytest.raises(RanksError, match="no answer in time from rank 0, 1"):
        two.call(time_waster, time_limit_s=0.5)


@pytest.mark.slow
def test_a_rank_that_left_out_what_the_others_wait_for_is_named(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.teaching.recording.ranks.LAG_S", 0.3)
    with pytest.raises(RanksError, match="no answer in time from rank 0. Rank 1 has returned"):
        two.call(leave_early)


def leave_early():
    import time

    time.sleep(60 * (1 - rank))  # noqa: F821


def test_a_start_that_takes_too_long_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RanksError, match="0 of 2 processes came. The launcher said"):
        torchrun(2, time_limit_s=0.1)
    assert not list(tmp_path.glob("ranks*"))


def time_waster():
    import time

    time.sleep(60)


def test_turns_add_up_gather_and_count() -> None:
    def work(group):
        total = group.all_reduce(torch.tensor([group.rank, 1]))
        side = group.all_gather(torch.tensor([[group.rank]]), dim=1)
        return total.tolist(), side.tolist(), group.all_gather_object("ab"[group.rank]), group.traffic.all_reduce_calls

    assert in_turns(2, work) == [([1, 2], [[0, 1]], ["a", "b"], 1)] * 2


def test_turns_do_not_hang_where_ranks_would() -> None:
    with pytest.raises(OutOfStepError, match="rank 0 comes to all_reduce of .1., rank 1 to no further collective"):
        in_turns(2, lambda group: group.all_reduce(torch.ones(1)) if group.rank == 0 else None)
    with pytest.raises(OutOfStepError, match=r"all_reduce of \[1\], rank 1 to all_reduce of \[2\]"):
        in_turns(2, lambda group: group.all_reduce(torch.ones(1 + group.rank)))

    def endless(group):
        while True:
            group.all_reduce(torch.ones(1))

    with pytest.raises(OutOfStepError, match="no end"):
        in_turns(2, endless)
