"""`python3 -m course_lib check NN`: the learner's notebook, run from top to bottom and graded by nbval.

nbval runs a copy of the notebook in which every check cell is the solved lesson's, with the output it must
print; no other cell's output is compared. Invariant: the learner's file is only read, and the copy removed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from course_lib.errors import CourseError
from course_lib.teaching.catalogue import Lesson
from course_lib.teaching.checking.exercise_file import UNAVAILABLE
from course_lib.teaching.learner.home import write_home
from course_lib.teaching.learner.merging import place
from course_lib.teaching.learner.progress import ProgressStore
from course_lib.teaching.learner.workspace import kernel_environment
from course_lib.teaching.lessons.nbval_run import NOT_REACHED, CellReport, run_nbval
from course_lib.teaching.notebook_files import (
    Cell,
    Notebook,
    cleared,
    exercise_of,
    read_notebook,
    write_notebook,
)

# a pass is its first line; what follows shows the answer at work, and another right answer may work otherwise
SANITIZE = r"""
regex: (?s)^(\d+\.\d+ \u00b7 passed\b).*
replace: \1
"""


@dataclass(frozen=True)
class ExerciseGrade:
    """One exercise: whether it passed (None where it cannot be checked), and what its check said."""

    exercise: str
    passed: bool | None
    said: str


@dataclass(frozen=True)
class Grade:
    """A lesson's exercises, in order, and what went wrong in other cells."""

    exercises: tuple[ExerciseGrade, ...]
    troubles: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(exercise.passed is not False for exercise in self.exercises)

    def text(self) -> str:
        """What the command prints."""
        grades = [exercise.passed for exercise in self.exercises]
        parts = [exercise.said for exercise in self.exercises]
        total = f"{grades.count(True)} of {len(grades)} exercises passed"
        if unavailable := grades.count(None):
            total += f", {unavailable} {UNAVAILABLE}"
        return "\n\n".join([*parts, *self.troubles, f"{total}."])


def grade(lesson: Lesson, work: Path) -> Grade:
    """Run the learner's copy of `lesson` in `work`, where its attempts count, and grade it.

    Raises DamagedNotebookError or OSError if a notebook cannot be read, CourseError if nothing could be run.
    """
    copy = lesson.work_copy(work)
    notebook = graded_notebook(read_notebook(copy), read_notebook(lesson.solution_notebook))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    reports = _run(notebook, copy, work)
    exercises, failed = [], []
    for number, cell in enumerate(cells):
        report = reports.get(number, NOT_REACHED)
        exercise = exercise_of(cell, "check")
        if exercise is not None:
            exercises.append(_exercise_grade(exercise, cell, report))
        elif not report.passed:
            failed.append((cell, report.problem))
    _remember(work, [exercise.exercise for exercise in exercises if exercise.passed is False])
    unavailable = {exercise.exercise for exercise in exercises if exercise.passed is None}
    troubles = [(cell, problem) for cell, problem in failed if exercise_of(cell, "ex") not in unavailable]
    return Grade(tuple(exercises), _troubles(troubles))


def graded_notebook(copy: Notebook, solved: Notebook) -> Notebook:
    """The learner's notebook with the check cells of the solved lesson, whose outputs nbval is to compare.

    A check cell that the learner deleted is back at its place. No other cell's output is compared: nbval
    compares nothing for a cell that, as far as its notebook tells, never ran.
    """
    checks = {cell["id"]: _compared(cell) for cell in solved["cells"] if exercise_of(cell, "check")}
    cells = [checks.pop(cell["id"], None) or cleared(cell) for cell in copy["cells"]]
    return {**copy, "cells": place(checks.values(), [cell["id"] for cell in solved["cells"]], cells)}


def _compared(cell: Cell) -> Cell:
    if cell["execution_count"] is None:  # nbval would pass whatever it printed
        raise CourseError("the solved lesson has no outputs to compare with: build it first.")
    tags = [*cell["metadata"].get("tags", []), "nbval-check-output"]
    return {**cell, "metadata": {**cell["metadata"], "tags": tags}}


def _run(notebook: Notebook, copy: Path, work: Path) -> dict[int, CellReport]:
    """The report of each code cell, by its number among them."""
    # beside the learner's notebook, so that its relative paths mean what they mean in JupyterLab
    running = copy.with_name(f".{copy.stem}.checked-{os.getpid()}.ipynb")
    try:
        write_notebook(running, notebook)
        return run_nbval(running, kernel_environment(work), SANITIZE)
    except CourseError as error:
        raise CourseError(f"{copy} could not be run: {error}") from error
    finally:
        running.unlink(missing_ok=True)


def _remember(work: Path, failed: list[str]) -> None:
    """Note the exercises that passed once and now have no verdict at all; the checks noted their own."""
    store = ProgressStore(work)
    try:
        known = store.read()
        for exercise in failed:
            if known.of(exercise).passed and not known.of(exercise).has_slipped:
                store.record_verdict(exercise, "not done")
        write_home(work, store)
    except (CourseError, OSError):
        pass  # what cannot be written was told by the checks


def _exercise_grade(exercise: str, solved: Cell, report: CellReport) -> ExerciseGrade:
    said = report.printed.strip() or f"{exercise} · not checked: {report.problem}"
    if said.startswith(f"{exercise} · {UNAVAILABLE}"):
        return ExerciseGrade(exercise, None, said)
    if report.passed:
        # of a pass, only what the solved lesson does not say: a note, or why it cannot serve in the engine
        expected = "\n".join("".join(output.get("text", "")) for output in solved["outputs"]).splitlines()
        remarks = [line for line in said.splitlines()[1:] if line not in expected]
        said = "\n".join([f"{exercise} · passed", *remarks])
    return ExerciseGrade(exercise, report.passed, said)


def _troubles(failed: list[tuple[Cell, str]]) -> tuple[str, ...]:
    """A sentence for each problem; cells in a row with the same one (the kernel has died) share it."""
    troubles = []
    for problem, group in groupby(failed, key=lambda entry: entry[1]):
        cells = [cell for cell, _ in group]
        first = next(iter(cells[0]["source"].strip().splitlines()), "")
        others = f" (and in {len(cells) - 1} after it)" if len(cells) > 1 else ""
        troubles.append(f"In the cell that begins with `{first[:80]}`{others}: {problem}")
    return tuple(troubles)
