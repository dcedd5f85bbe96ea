"""`python3 -m course_lib check NN`: the learner's notebook, run from top to bottom and graded by nbval.

nbval runs a copy of the notebook in which every check cell is the solved lesson's, with the output it must
print; no other cell's output is compared. Invariants: the learner's file is only read; whatever ends the run,
Ctrl-C included, ends pytest and the kernel, and removes the copy.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from course_lib.bootstrap.process import on_terminal, run
from course_lib.errors import CourseError
from course_lib.teaching.catalogue import Lesson
from course_lib.teaching.merging import place
from course_lib.teaching.notebook_files import (
    Cell,
    Notebook,
    cleared,
    exercise_of,
    read_notebook,
    write_notebook,
)
from course_lib.teaching.workspace import kernel_environment

CELL_TIMEOUT_S = 120
# a pass is its first line; what follows shows the answer at work, and another right answer may work otherwise
SANITIZE = r"""
regex: (?s)^(\d+\.\d+ \u00b7 passed\b).*
replace: \1
"""


@dataclass(frozen=True)
class ExerciseGrade:
    """One exercise: whether it passed, and what its check said."""

    exercise: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Grade:
    """A lesson's exercises, in order, and what went wrong in other cells."""

    exercises: tuple[ExerciseGrade, ...]
    troubles: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(exercise.passed for exercise in self.exercises)

    def text(self) -> str:
        """What the command prints."""
        passed = sum(exercise.passed for exercise in self.exercises)
        parts = [exercise.said for exercise in self.exercises]
        return "\n\n".join([*parts, *self.troubles, f"{passed} of {len(self.exercises)} exercises passed."])


def grade(lesson: Lesson, work: Path) -> Grade:
    """Run the learner's copy of `lesson` in `work`, where its attempts count, and grade it.

    Raises DamagedNotebookError or OSError if a notebook cannot be read, CourseError if nothing could be run.
    """
    copy = lesson.work_copy(work)
    notebook = graded_notebook(read_notebook(copy), read_notebook(lesson.solution_notebook))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    reports = _run_nbval(notebook, copy, work)
    exercises, failed = [], []
    for number, cell in enumerate(cells):
        report = reports.get(number, {"passed": False, "printed": "", "problem": "the run did not get there"})
        exercise = exercise_of(cell, "check")
        if exercise is not None:
            exercises.append(_exercise_grade(exercise, cell, report))
        elif not report["passed"]:
            failed.append((cell, report["problem"]))
    return Grade(tuple(exercises), _troubles(failed))


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


def _run_nbval(notebook: Notebook, copy: Path, work: Path) -> dict[int, dict[str, Any]]:
    """What `cell_reports` says of each code cell, by its number among them."""
    # beside the learner's notebook, so that its relative paths mean what they mean in JupyterLab
    running = copy.with_name(f".{copy.stem}.checked-{os.getpid()}.ipynb")
    with tempfile.TemporaryDirectory(prefix="course-check-") as folder:
        reports, log, sanitize = (Path(folder, name) for name in ("reports", "log", "sanitize"))
        reports.touch()
        sanitize.write_text(SANITIZE, encoding="utf-8")
        options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}"]
        options += [
            f"--nbval-sanitize-with={sanitize}",
            "--color=no",
            f"--rootdir={folder}",
            f"-c{os.devnull}",
        ]
        options += [
            "--noconftest",
            "-pno:cacheprovider",
            "-pnbval.plugin",
            "-pcourse_lib.teaching.cell_reports",
        ]
        environment = kernel_environment(
            work, COURSE_CELL_REPORTS=str(reports), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS=""
        )
        command = [sys.executable, "-m", "pytest", *options, str(running)]
        with _progress_descriptor() as descriptors:
            environment["COURSE_CELL_PROGRESS"] = "".join(map(str, descriptors))
            heartbeat = None if descriptors else f"running {copy.name}"
            try:
                write_notebook(running, notebook)
                run(command, env=environment, pass_fds=descriptors, output=log, heartbeat=heartbeat)
            finally:
                running.unlink(missing_ok=True)
        lines = reports.read_text(encoding="utf-8").splitlines()
        if not lines:
            last_words = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise CourseError(
                f"{copy} could not be run: nbval started no cell. Its last words:\n{last_words}"
            )
    return {report["cell"]: report for report in map(json.loads, lines)}


@contextmanager
def _progress_descriptor() -> Iterator[tuple[int, ...]]:
    """A descriptor on which `cell_reports` can show a person where the run is; none if nobody is watching."""
    if not on_terminal():
        yield ()
        return
    descriptor = os.dup(sys.stdout.fileno())
    try:
        yield (descriptor,)
    finally:
        os.close(descriptor)
        print("\r\033[K", end="", flush=True)


def _exercise_grade(exercise: str, solved: Cell, report: dict[str, Any]) -> ExerciseGrade:
    said = report["printed"].strip() or f"{exercise} · not checked: {report['problem']}"
    if report["passed"]:
        # of a pass, only what the solved lesson does not say: a note, or why it cannot serve in the engine
        expected = "\n".join("".join(output.get("text", "")) for output in solved["outputs"]).splitlines()
        remarks = [line for line in said.splitlines()[1:] if line not in expected]
        said = "\n".join([f"{exercise} · passed", *remarks])
    return ExerciseGrade(exercise, report["passed"], said)


def _troubles(failed: list[tuple[Cell, str]]) -> tuple[str, ...]:
    """A sentence for each problem; cells in a row with the same one (the kernel has died) share it."""
    troubles = []
    for problem, group in groupby(failed, key=lambda entry: entry[1]):
        cells = [cell for cell, _ in group]
        first = next(iter(cells[0]["source"].strip().splitlines()), "")
        others = f" (and in {len(cells) - 1} after it)" if len(cells) > 1 else ""
        troubles.append(f"In the cell that begins with `{first[:80]}`{others}: {problem}")
    return tuple(troubles)
