"""Where in a learner's code an exception comes from.

"The learner's code" is what has the globals of a function of the answer: the cells of one notebook, or the
module of a stored answer. Invariant: any exception can be asked about, however its causes are tied together.
"""

from __future__ import annotations

import linecache
import traceback
from types import FrameType

from course_lib.teaching.checking.answer_code import functions_of
from course_lib.teaching.checking.exercise_parts import Answer

OUTSIDE = "It happened where the check calls your code: do its arguments and its result fit the description?"
DEEPEST = 10  # exceptions that replaced one another; they can be tied into a ring


def learners_own(error: BaseException, answer: Answer) -> BaseException:
    """`error`, or the learner's own exception where other code, which called theirs, replaced it by `error`.

    Triton's interpreter does that: it runs a kernel and raises an error of its own from the kernel's.
    """
    found = error
    for _ in range(DEEPEST):
        error = error.__cause__ if error.__suppress_context__ else error.__context__
        passed = [] if error is None else list(traceback.walk_tb(error.__traceback__))
        if not passed or _is_of(answer, passed[0][0]):  # the learner caught it, and what came next is theirs
            break
        if _last_line(error, answer):
            found = error
    return found


def where(error: BaseException, answer: Answer) -> str:
    """The innermost line of the learner's code that the exception passed, in a sentence."""
    if found := _last_line(error, answer):
        frame, line = found
        text = linecache.getline(frame.f_code.co_filename, line).strip()
        return f"It happened in `{frame.f_code.co_name}`, line {line}" + (f": {text}" if text else ".")
    return OUTSIDE


def _last_line(error: BaseException, answer: Answer) -> tuple[FrameType, int] | None:
    passed = reversed(list(traceback.walk_tb(error.__traceback__)))
    return next(((frame, line) for frame, line in passed if _is_of(answer, frame)), None)


def _is_of(answer: Answer, frame: FrameType) -> bool:
    return any(frame.f_globals is function.__globals__ for function in functions_of(answer).values())
