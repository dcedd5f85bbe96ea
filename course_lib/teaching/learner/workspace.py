"""The learner's folder: copies of the lessons, made, brought up to date and recovered.

Invariant: nothing that the learner wrote is ever deleted. A copy is replaced in one step, and the file that
it replaces stays in `.backup/` or, if it was damaged, beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from course_lib.bootstrap.places import REPO_ROOT, child_environment
from course_lib.teaching.catalogue import Lesson
from course_lib.teaching.learner.merging import fill_answers, merge
from course_lib.teaching.notebook_files import (
    DamagedNotebookError,
    Notebook,
    cleared,
    course_metadata,
    read_notebook,
    replace_file,
    write_notebook,
)

WELCOME_SOURCE = REPO_ROOT / "course_lib" / "teaching" / "welcome" / "welcome.py"


def work_folder() -> Path:
    """Where the learner works: `COURSE_WORK`, or `work/` in the repository."""
    setting = os.environ.get("COURSE_WORK", "").strip()
    return Path(os.path.abspath(os.path.expanduser(setting))) if setting else REPO_ROOT / "work"


def kernel_environment(work: Path, **changes: str) -> dict[str, str]:
    """The environment of a process whose kernels import `course_lib` and record progress in `work`."""
    paths = filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")])
    return child_environment(COURSE_WORK=str(work), PYTHONPATH=os.pathsep.join(paths), **changes)


def update(work: Path, lessons: Iterable[Lesson], answers: Mapping[str, str]) -> list[str]:
    """Make or refresh the copies of the written ones of `lessons`; a sentence for each thing that happened.

    answers: the last recorded source of each exercise, for copies that cannot be read any more.
    What is wrong with one copy is told, and does not keep the others from being made.
    """
    said: list[str] = []
    made: list[str] = []
    failed: dict[str, list[str]] = {}
    for lesson in lessons:
        if not lesson.is_written:
            continue
        copy = lesson.work_copy(work)
        shown = copy.relative_to(work.parent)
        try:
            fresh = _fresh(lesson)
        except (OSError, DamagedNotebookError):
            said.append(
                f"Lesson {lesson.number} has no readable notebook in {lesson.notebook.parent}:"
                f" `python3 -m course_lib build {lesson.number}` makes it."
            )
            continue
        try:
            if copy.exists():
                said += [f"{shown}: {event}" for event in _refresh(work, copy, fresh, answers)]
            else:
                write_notebook(copy, fresh)
                made.append(lesson.number)
        except OSError as error:
            failed.setdefault(error.strerror or str(error), []).append(str(shown))
    if made:
        said.insert(0, f"Your copies of the lessons are made in {work}: {', '.join(made)}.")
    for reason, copies in failed.items():
        said.append(f"{', '.join(copies)}: not written ({reason}). When that is mended, run this again.")
    return said


def make_welcome(work: Path) -> Path:
    """The learner's copy of the welcome notebook: made once, then theirs. Raises OSError."""
    notebook = work / "welcome.ipynb"
    if not notebook.exists():
        import jupytext  # takes a second, and is needed once

        write_notebook(notebook, jupytext.read(WELCOME_SOURCE))
    return notebook


def _fresh(lesson: Lesson) -> Notebook:
    edition = read_notebook(lesson.notebook)
    return {**edition, "cells": [cleared(cell) for cell in edition["cells"]]}


def _refresh(work: Path, copy: Path, fresh: Notebook, answers: Mapping[str, str]) -> list[str]:
    try:
        notebook = read_notebook(copy)
    except DamagedNotebookError:
        return [_recover(copy, fresh, answers)]
    if course_metadata(notebook).get("source_hash") == course_metadata(fresh).get("source_hash"):
        return []
    merged = merge(notebook, fresh)
    if _texts(merged.notebook) == _texts(notebook):  # only what the exercises' checks say has changed
        write_notebook(copy, merged.notebook)
        return []
    backup = _unused(work / ".backup" / copy.name)
    replace_file(backup, copy.read_bytes())
    write_notebook(copy, merged.notebook)
    return [
        f"brought to the lesson's new edition; cells new or changed: {merged.new}, kept as you edited them:"
        f" {merged.kept}, your own: {merged.own} (the file as it was: {backup.relative_to(work.parent)})."
    ]


def _recover(copy: Path, fresh: Notebook, answers: Mapping[str, str]) -> str:
    checkpoint = copy.parent / ".ipynb_checkpoints" / f"{copy.stem}-checkpoint.ipynb"
    try:
        notebook, origin = read_notebook(checkpoint), "JupyterLab's last checkpoint"
    except (OSError, DamagedNotebookError):
        notebook, origin = fresh, "the lesson"
    notebook, filled = fill_answers(merge(notebook, fresh).notebook, answers)
    if filled:
        origin += f" and your last checked answers to {', '.join(filled)}"
    aside = _unused(copy.with_name(f"{copy.stem}.damaged.ipynb"))
    replace_file(aside, copy.read_bytes())
    write_notebook(copy, notebook)
    return f"was damaged; restored from {origin} (the file as it was: {aside.name})."


def _texts(notebook: Notebook) -> list[tuple[str, str]]:
    return [(cell["id"], cell["source"]) for cell in notebook["cells"]]


def _unused(path: Path) -> Path:
    """`path` with the first number that no file has: lesson-1.ipynb, lesson-2.ipynb, …"""
    number = 1
    while (numbered := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return numbered
