"""Judges an answer to an exercise, and says what the learner should read.

Invariant: `judge` raises nothing that the answer causes, gives it at most `SECONDS` in all, leaves the
notebook as it was, and says the same of the same answer: no seconds, no memory addresses, few digits.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from course_lib.teaching.checking.answer_code import does_nothing, hidden_builtins
from course_lib.teaching.checking.comparing import difference
from course_lib.teaching.checking.describing import describe, describe_error, is_cut
from course_lib.teaching.checking.exercise_file import UNAVAILABLE, Exercise
from course_lib.teaching.checking.exercise_parts import Answer, Diagnostic, Failure
from course_lib.teaching.checking.tracing_back import OUTSIDE, learners_own, where
from course_lib.teaching.checking.trial import Outcome, TookTooLong, attempt, isolated

SECONDS = 3.0  # for all calls of an answer during one check
RESULT_WIDTH = 320  # characters shown of a result
PRINTED_LINES, PRINTED_WIDTH = 10, 100  # shown of what an answer printed
RETOLD_LINES = 12  # shown of what happened before the first difference

HEADLINES = {
    "not done": "not done yet",
    "raised": "your code raised an error",
    "wrong shape": "wrong type or shape",
    "mistake": "not right yet",
    "wrong": "not right yet",
    "too much work": "right, but does too much work",
    "passed": "passed",
    "unavailable": UNAVAILABLE,
}


@dataclass(frozen=True)
class Verdict:
    """What a check found. `kind` is a key of HEADLINES, `diagnostic` the name of the one that applied,
    `example` the failing case in lines of plain text.
    """

    kind: str
    exercise_id: str
    message: str
    diagnostic: str | None = None
    notes: tuple[str, ...] = ()
    example: str = ""

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    def text(self) -> str:
        """What `check` prints."""
        parts = [self.message, self.example, *(f"Note: {note}" for note in self.notes)]
        separator = ": " if self.kind == "unavailable" else "\n"
        return separator.join([f"{self.exercise_id} · {HEADLINES[self.kind]}", *filter(None, parts)])


def judge(exercise: Exercise, answer: Answer) -> Verdict:
    """The verdict on a learner's function or class. Stops at the first case that fails."""
    if exercise.obstacle:
        return Verdict("unavailable", exercise.id, exercise.obstacle)
    if does_nothing(answer):
        return Verdict("not done", exercise.id,
                       "Write the missing part in the exercise's cell, run that cell, then run this one "
                       f'again. For a nudge: hint("{exercise.id}")')
    trials = _Trials(exercise, answer)
    for i in range(len(trials.cases)):
        if failure := trials.failure(i):
            return _told(trials, i, failure)
    for budget in exercise.budgets:
        outcome = trials.call(budget.count, (answer,), {})
        if outcome.error:
            kind, message = _about_error(outcome.error, answer)
            return Verdict(kind, exercise.id, message, notes=trials.notes(outcome))
        if outcome.value > budget.most:
            counted = f"Counted ({budget.unit}): yours {outcome.value:,}, enough {budget.most:,}."
            return Verdict("too much work", exercise.id, f"{budget.message}\n{counted}", notes=trials.notes())
    return Verdict("passed", exercise.id, f"All {len(trials.cases)} cases are right.", notes=trials.notes())


class _Trials:
    """The answer's outcome in every case, found when asked for, and what to note about all its calls."""

    def __init__(self, exercise: Exercise, answer: Answer) -> None:
        self.exercise, self.answer = exercise, answer
        with isolated():  # the same cases every time, even if they draw from torch without a generator
            self.cases = exercise.make_cases()
        self.outcome = functools.cache(self._outcome)
        self.seconds_left, self.printed, self.replaced = SECONDS, 0, set()

    def call(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Outcome:
        start = time.monotonic()
        outcome = attempt(function, args, kwargs, self.seconds_left)
        self.seconds_left -= time.monotonic() - start
        self.printed += outcome.printed
        self.replaced |= set(outcome.replaced)
        return outcome

    def _outcome(self, i: int) -> Outcome:
        case = self.cases[i]
        return self.call(functools.partial(self.exercise.use, self.answer), case.args, case.kwargs)

    def changed(self, i: int, outcome: Outcome) -> tuple[str, ...]:
        """The names of the arguments that were changed and may not be."""
        case = self.cases[i]
        names = self.exercise.argument_names(case)
        found = (names[at] if isinstance(at, int) else at for at in outcome.changed)
        return tuple(name for name in found if name not in case.may_change)

    def failure(self, i: int) -> Failure | None:
        case, outcome = self.cases[i], self.outcome(i)
        args, kwargs = copy.deepcopy((case.args, case.kwargs))
        with isolated():
            expected = self.exercise.expected_function(*args, **kwargs)
        changed = self.changed(i, outcome)
        if not outcome.error and not changed and self.same(i, outcome.value, expected):
            return None
        return Failure(case, outcome.value, expected, outcome.error, changed)

    def same(self, i: int, got: Any, expected: Any) -> bool:
        if self.exercise.same_function is None:
            return difference(got, expected) is None
        try:
            return bool(self.exercise.same_function(got, expected, self.cases[i]))
        except Exception:  # a result of another type than it knows
            return False

    def equal(self, mistaken: Answer, i: int) -> bool:
        """Whether a mistaken answer has the learner's result, or type of exception, in case i."""
        case, mine = self.cases[i], self.outcome(i)
        theirs = attempt(functools.partial(self.exercise.use, mistaken), case.args, case.kwargs, SECONDS)
        if mine.error or theirs.error:
            return type(mine.error) is type(theirs.error)
        return difference(mine.value, theirs.value) is None or self.same(i, mine.value, theirs.value)

    def changes_as_mine(self, mistaken: Answer, i: int) -> bool:
        """Whether a mistaken answer changes the arguments that the learner's changes in case i."""
        case, mine = self.cases[i], self.outcome(i)
        theirs = attempt(functools.partial(self.exercise.use, mistaken), case.args, case.kwargs, SECONDS)
        return theirs.changed == mine.changed

    def notes(self, shown: Outcome | None = None) -> tuple[str, ...]:
        """What deserves a remark; with the output of the call that is told about."""
        notes = []
        if shown and shown.printed:
            lines = [line[:PRINTED_WIDTH] for line in shown.output.splitlines()[:PRINTED_LINES]]
            rest = shown.printed - sum(len(line) + 1 for line in lines)
            notes.append("\n  ".join([f"in this case your code printed {shown.printed:,} characters:", *lines,
                                      *(["…"] if rest > 0 else [])]))
        elif self.printed:
            notes.append(f"your code printed {self.printed:,} characters, which a check does not show.")
        if self.replaced:
            names = sorted(self.replaced)
            more = f" and {len(names) - 3} others" if len(names) > 3 else ""
            notes.append(f"your code replaced Python's {_listed(names[:3])}{more}: put back.")
        notes += [f"your notebook has a variable named `{name}`, which hides Python's. To undo: del {name}"
                  for name in hidden_builtins(self.answer)]
        return tuple(notes)


def _told(trials: _Trials, i: int, failure: Failure) -> Verdict:
    """The verdict on an answer that fails in case i."""
    exercise, notes = trials.exercise, trials.notes(trials.outcome(i))
    name = None
    is_right = not failure.error and trials.same(i, failure.got, failure.expected)
    candidates = exercise.diagnostics.values()
    if is_right:  # most diagnostics take for granted that the result is wrong: only those of the change count
        unchanged = replace(failure, changed=())
        candidates = [d for d in candidates if (
            not _applies(d, trials, i, unchanged) if d.kind == "symptom" else trials.changes_as_mine(d.function, i))]
    if found := next((d for d in candidates if _applies(d, trials, i, failure)), None):
        kind, message, name = "mistake", found.message, found.name
        if failure.error and not isinstance(failure.error, TookTooLong):  # the diagnostic says why it took so long
            message += "\n" + _about_error(failure.error, trials.answer)[1].replace(f"\n{OUTSIDE}", "")
    elif failure.error:
        kind, message = _about_error(failure.error, trials.answer)
    elif is_right:
        kind, message = "wrong", "The result is right, but your " + _about_changes(failure)
    else:
        kind, message = _about_result(failure, exercise)
        if failure.changed:
            notes += ("your " + _about_changes(failure),)
    return Verdict(kind, exercise.id, message, name, notes, _example(exercise, failure, message))


def _applies(diagnostic: Diagnostic, trials: _Trials, i: int, failure: Failure) -> bool:
    if diagnostic.kind == "symptom":
        try:
            return bool(diagnostic.function(failure))
        except Exception:  # a result of another form than the symptom looks for
            return False
    if isinstance(failure.error, TookTooLong):
        return False  # no time is left to compare with
    order = [i, *(j for j in range(len(trials.cases)) if j != i)]  # most mistaken answers differ in the first
    return all(trials.equal(diagnostic.function, j) for j in order)


def _example(exercise: Exercise, failure: Failure, told: str) -> str:
    """The failing case; where the results are shown in part, also where they differ unless `told` says so."""
    case = failure.case
    names = exercise.argument_names(case)
    lines = [f"Case: {case.label}"]
    values = [*case.args, *case.kwargs.values()]
    lines += [f"  {name} = {describe(value)}" for name, value in zip(names, values, strict=True)
              if name not in case.retold]
    if case.retold and _are_lines(failure.expected) and (failure.error or _are_lines(failure.got)):
        return "\n".join(lines + _retold(failure))
    lines.append(f"Expected: {describe(failure.expected, RESULT_WIDTH)}")
    if not failure.error:
        lines.append(f"Yours: {describe(failure.got, RESULT_WIDTH)}")
        # what `same` accepts is its own matter: another difference than it means may come first
        found = None if exercise.same_function else difference(failure.got, failure.expected)
        if found and found.sentence not in told and any(is_cut(line) for line in lines[-2:]):
            lines.append(f"The first difference: {found.sentence}")
    return "\n".join(lines)


def _are_lines(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(line, str) for line in value)


def _retold(failure: Failure) -> list[str]:
    """What happened until the results differ, one event a line; after an error what should have happened."""
    expected = [_cut_line(line) for line in failure.expected]
    if failure.error:
        rest = [f"  … ({len(expected):,} lines)"] if len(expected) > RETOLD_LINES else []
        return ["Expected:", *(f"  {line}" for line in expected[:RETOLD_LINES]), *rest]
    pairs = list(zip(failure.got, failure.expected, strict=False))
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    shown = [f"  {line}" for line in expected[max(0, same - RETOLD_LINES):same]]
    if same > RETOLD_LINES:
        shown.insert(0, f"  … ({same - RETOLD_LINES:,} lines as expected)")
    ends = [_cut_line(lines[same]) if same < len(lines) else "(nothing more)"
            for lines in (failure.expected, failure.got)]
    return [*(["As expected:", *shown] if shown else []), f"Expected: {ends[0]}", f"Yours:    {ends[1]}"]


def _cut_line(line: str) -> str:
    return line if len(line) <= RESULT_WIDTH else f"{line[:RESULT_WIDTH - 1]}…"


def _about_result(failure: Failure, exercise: Exercise) -> tuple[str, str]:
    """Kind of verdict and message for a result that is not right."""
    if exercise.same_function and failure.got is not None:  # `same` alone knows what is compared
        return "wrong", "The result is not right in this case."
    if failure.case.retold and _are_lines(failure.expected) and _are_lines(failure.got):
        return "wrong", "The last event below should have another outcome."
    found = difference(failure.got, failure.expected)
    return "wrong shape" if found.of_type else "wrong", found.sentence


def _about_changes(failure: Failure) -> str:
    return (f"code changed its argument {_listed(failure.changed)} in place, "
            "which its caller still needs: work on a copy.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _about_error(error: BaseException, answer: Answer) -> tuple[str, str]:
    """Kind of verdict and message for an answer that ended with an exception."""
    error = learners_own(error, answer)
    if isinstance(error, TookTooLong):
        return "wrong", (f"Your code was stopped after {SECONDS:g} seconds without a result. "
                         "Is there a loop that never ends?")
    if isinstance(error, SystemExit):
        return "raised", "Your code called sys.exit(), which ends Python: return a result instead."
    if isinstance(error, RecursionError):  # where and how it is noticed depends on the depth of the caller
        return "raised", "RecursionError: a function calls itself without end."
    notes = getattr(error, "__notes__", ())  # of the exercise's `run`: what it was doing
    during = [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return "raised", "\n".join([describe_error(error), where(error, answer), *during])
