"""The gates of a lesson: each returns the lesson's problems as sentences, an empty list when it passes.

    1 same_cells          the notebooks are what the source gives, run from top to bottom
    2 solved_runs         the solved edition runs under nbval and passes its own checks
    3 stubs_fail          an untouched stub says "not done yet"
    4 answers_are_judged  wrong answers are told their own diagnostic, right ones pass
    5 solutions_hidden    no line of a solution is in the learner's notebook
    6 learner_runs        the learner's edition runs under nbval with no exercise done
    7 is_well_formed      budgets, links, terms, ids (budgets.py)

`tests/lessons/test_gates.py` runs them on every lesson, `test_gates_fail.py` shows that each can fail.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jupytext
import nbformat
from nbformat import NotebookNode

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching.building.builder import (
    EDITIONS,
    WIDGET_VIEW,
    lesson_environment,
    make_notebook,
    notebook_path,
)
from course_lib.teaching.checking.exercise_file import UNAVAILABLE, load_exercises
from course_lib.teaching.checking.judging import judge
from course_lib.teaching.lessons.lesson_source import LessonError, is_stub, read_lesson
from course_lib.teaching.lessons.nbval_run import NOT_REACHED, run_nbval

if TYPE_CHECKING:
    from course_lib.teaching.catalogue import Lesson

SHORTEST_SECRET = 8  # characters; shorter solution lines are `return x` and the like
_MACHINE = re.compile(r"/(?:home|root|Users|tmp|var/folders)/\w+|" + re.escape(str(REPO_ROOT)) + r"\b")

Gate = Callable[..., list[str]]


def gate(function: Gate) -> Gate:
    """Make what cannot be read a problem like any other."""

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> list[str]:
        try:
            return function(*args, **kwargs)
        except (CourseError, OSError, ValueError) as error:
            return [str(error)]

    return checked


def stored_notebook(lesson: Lesson, edition: str) -> NotebookNode:
    """The notebook in the repository. Raises LessonError if it is missing or damaged."""
    path = notebook_path(lesson, edition)
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        remedy = f"`python3 -m course_lib build {lesson.number}` makes it"
        raise LessonError(f"{path} cannot be read ({type(error).__name__}): {remedy}.") from error


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    """The text among a code cell's outputs."""
    texts = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "".join(texts)


@gate
def same_cells(lesson: Lesson) -> list[str]:
    """Gate 1: regenerating gives the same cells, and the outputs come from one run of them."""
    problems = _jupytext_differences(lesson)
    for edition in EDITIONS:
        fresh, stored = make_notebook(lesson, edition), stored_notebook(lesson, edition)
        name = notebook_path(lesson, edition).name + f" ({edition} edition)"
        if stored.metadata != fresh.metadata:
            problems.append(f"{name}: made from another source, or its metadata was changed; build it again.")
        if [cell.id for cell in stored.cells] != [cell.id for cell in fresh.cells]:
            problems.append(f"{name}: its cells are not those of the source; build it again.")
        made = {cell.id: cell for cell in fresh.cells}
        for cell in stored.cells:
            new = made.get(cell.id, cell)
            if (cell.cell_type, cell.source, cell.metadata) != (new.cell_type, new.source, new.metadata):
                problems.append(f"{name}: cell {cell.id} is not what the source gives; build it again.")
        code = code_cells(stored)
        if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
            problems.append(f"{name}: it was not run from top to bottom; build it again.")
        for cell in code:
            problems += [f"{name}: cell {cell.id} {problem}" for problem in _output_problems(cell)]
    return problems


def _output_problems(cell: NotebookNode) -> list[str]:
    problems = []
    if any(output.output_type == "error" for output in cell.outputs):
        problems.append("stores an error.")
    if any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs):
        problems.append("stores a widget, which nothing can show without its kernel.")
    if place := _MACHINE.search(printed(cell)):
        problems.append(f"prints a path of this machine: {place[0]}.")
    return problems


def _jupytext_differences(lesson: Lesson) -> list[str]:
    """Where jupytext would read another cell than `percent.py`."""
    theirs = jupytext.reads(lesson.source.read_text(encoding="utf-8"), fmt="py:percent").cells
    ours = make_notebook(lesson, "solved").cells[1:]
    if len(theirs) != len(ours):
        return [f"jupytext finds {len(theirs)} cells in {lesson.source.name}, and the builder {len(ours)}."]
    return [
        f"jupytext reads cell {our.id} of {lesson.source.name} otherwise than the builder."
        for our, their in zip(ours, theirs, strict=True)
        if our.cell_type != their.cell_type
        or ("exercise" not in our.metadata.get("tags", ()) and our.source != their.source)
    ]


@gate
def solved_runs(lesson: Lesson) -> list[str]:
    """Gate 2: the solved edition runs under nbval, and its check cells say that all is passed."""
    return run_edition(lesson, "solved") + _verdicts(lesson, "solved", "passed")


@gate
def stubs_fail(lesson: Lesson) -> list[str]:
    """Gate 3: the learner's edition starts with nothing done, and says so."""
    problems = [
        f"the stub of {exercise_id} is its solution: nothing is left to do."
        for exercise_id, cell in read_lesson(lesson).exercise_cells.items()
        if is_stub(cell.solved, cell.learner)
    ]
    return problems + _verdicts(lesson, "learner", "not done yet")


def _verdicts(lesson: Lesson, edition: str, verdict: str) -> list[str]:
    cells = {cell.id: cell for cell in stored_notebook(lesson, edition).cells}
    problems = []
    for exercise_id, check in read_lesson(lesson).check_cells.items():
        text = printed(cells[check.id]) if check.id in cells else "nothing, for there is no such cell"
        if not text.startswith(f"{exercise_id} · {verdict}"):
            call = f'check("{exercise_id}")'
            problems.append(f'{edition} edition: {call} should say "{verdict}"; it says: {text}')
    return problems


@gate
def answers_are_judged(lesson: Lesson) -> list[str]:
    """Gate 4: every registered answer gets the verdict that its author means it to get."""
    problems = []
    for exercise in load_exercises(lesson.exercises).exercises.values():
        problems += [f"{exercise.id}: {shortcoming}." for shortcoming in exercise.shortcomings()]
        if exercise.obstacle:
            continue  # its answers are judged where they can be
        expected = [(answer, f"be told {name!r}") for name, answer in exercise.wrong_answers]
        expected += [(answer, "pass") for answer in exercise.accepted_answers]
        expected += [(answer, "be told of too much work") for answer in exercise.wasteful_answers]
        for answer, meant in expected:
            verdict = judge(exercise, answer)
            if verdict.kind == "too much work":
                got = "be told of too much work"
            elif verdict.passed:
                got = "pass"
            else:
                got = f"be told {verdict.diagnostic!r}"
            if got != meant:
                difference = f"{_place(answer)} should {meant}, but would {got}"
                problems.append(f"{exercise.id}: {difference}: {verdict.text()}")
    return problems


def _place(answer: Any) -> str:
    """Where an answer is written; most of them are functions named `_`."""
    functions = [answer, *vars(answer).values()] if isinstance(answer, type) else [answer]
    lines = [function.__code__.co_firstlineno for function in functions if hasattr(function, "__code__")]
    return f"the answer in line {min(lines)}" if lines else f"the answer {answer!r}"


@gate
def solutions_hidden(lesson: Lesson) -> list[str]:
    """Gate 5: a solution line is in the learner's notebook only if the source has it elsewhere too."""
    cells = read_lesson(lesson).cells
    shown = {line.strip() for cell in cells if cell.kind == "code" for line in cell.learner.splitlines()}
    secret = {line.strip() for cell in cells for line in cell.solution_lines} - shown
    secret = {line for line in secret if len(line) >= SHORTEST_SECRET and not line.startswith("#")}
    problems = []
    for cell in stored_notebook(lesson, "learner").cells:
        text = cell.source + ("\n" + printed(cell) if cell.cell_type == "code" else "")
        leaked = secret & {line.strip() for line in text.splitlines()}
        problems += [f"cell {cell.id} shows a line of a solution: {line}" for line in sorted(leaked)]
    return problems


@gate
def learner_runs(lesson: Lesson) -> list[str]:
    """Gate 6: the learner's edition runs under nbval with no exercise done."""
    return run_edition(lesson, "learner")


def run_edition(lesson: Lesson, edition: str) -> list[str]:
    """Run a stored notebook under nbval, with an empty work folder, and say what fails and why."""
    cells = code_cells(stored_notebook(lesson, edition))
    with tempfile.TemporaryDirectory(prefix="course-gate-") as folder:
        notebook = Path(shutil.copy(notebook_path(lesson, edition), folder))
        reports = run_nbval(notebook, lesson_environment(Path(folder)))
    found = [(number, cell, reports.get(number, NOT_REACHED)) for number, cell in enumerate(cells, 0)]
    # an exercise that cannot be checked here neither passes nor fails: not its "check" cell, not its "ex" cell
    beyond = [cell.id for _, cell, report in found if f" · {UNAVAILABLE}" in report.printed.partition("\n")[0]]
    excused = {f"{kind}-{name.removeprefix('check-')}" for name in beyond for kind in ("check", "ex")}
    return [
        f"{edition} edition, cell {number + 1} ({cell.id}): {report.details or report.problem}"
        for number, cell, report in found
        if not report.passed and cell.id not in excused
    ]
