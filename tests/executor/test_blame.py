"""Who is named when several ranks are in trouble at once."""

from __future__ import annotations

import pytest

from course_lib.executor.blame import Witness, describe, find_culprits
from course_lib.executor.portable import Failure

FAILED = Failure("execute_model", "ValueError: x", 'File "model.py", line 3, in forward', None)
LOST_THE_OTHER = Failure("execute_model", "RuntimeError: closed by peer", 'File "…/torch_group.py", line 5', None)
COMPUTES, COMMUNICATES = 'File "…/norm.py", line 3 in forward', 'File "…/torch_group.py", line 9 in all_reduce'


@pytest.mark.parametrize(
    ("witnesses", "guilty"),
    [
        ([Witness("a", failure=LOST_THE_OTHER), Witness("b", ended="was killed by SIGKILL")], "b"),
        ([Witness("a", failure=LOST_THE_OTHER), Witness("b", failure=FAILED)], "b"),
        ([Witness("a"), Witness("b", failure=LOST_THE_OTHER)], "b"),  # for all one can know
        ([Witness("a", traceback=COMPUTES), Witness("b", traceback=COMMUNICATES)], "a"),
        ([Witness("a", traceback="x", is_idle=True), Witness("b", traceback=COMPUTES)], "b"),
        ([Witness("a", traceback=COMMUNICATES), Witness("b", traceback=COMMUNICATES)], "ab"),
    ],
)
def test_the_culprit_is_found_among_the_witnesses(witnesses: list[Witness], guilty: str) -> None:
    assert "".join(one.title for one in find_culprits(witnesses)) == guilty


def test_the_first_line_says_everything_and_the_traceback_follows() -> None:
    assert describe([Witness("rank 1", failure=FAILED)], "step 3", "300 s") == (
        "rank 1 failed with ValueError: x; this happened during step 3. The engine has stopped: make a new one."
        '\nThe last traceback of rank 1:\nFile "model.py", line 3, in forward'
    )
    assert describe([Witness("r", ended="was killed by SIGKILL")], "step 3", "").count("\n") == 0
    assert "hangs: it has not answered within 5 s;" in describe([Witness("r", traceback="t")], "step 3", "5 s")
