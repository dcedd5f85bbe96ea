"""A learner's copy of a lesson brought to a new edition, cell by cell.

Pure functions on notebooks (see `notebook_files`). Invariant: no source that the learner wrote is missing
from the result, and the course's cells come in the new edition's order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from course_lib.teaching.notebook_files import Cell, Notebook, cleared, course_metadata, digest, exercise_of


@dataclass(frozen=True)
class Merged:
    """A notebook of the new edition with the learner's work in it, and what there was of either."""

    notebook: Notebook
    kept: int  # course cells that the learner had edited, exercises among them
    own: int  # cells of the learner's own
    new: int  # cells that are new or changed


def merge(copy: Notebook, edition: Notebook) -> Merged:
    """Bring the learner's `copy` to `edition`.

    A course cell that the learner edited keeps their source; any other gets the edition's. Cells of their
    own stay behind the cell that they follow, or before the next one if that cell is gone.
    """
    theirs = {cell["id"]: cell for cell in copy["cells"]}
    known = {cell["id"] for cell in edition["cells"]}
    course = [_merged_cell(theirs.get(cell["id"]), cell) for cell in edition["cells"]]
    own = [cell for cell in copy["cells"] if cell["id"] not in known and _is_edited(cell)]
    kept = sum(cell["id"] in theirs and _is_edited(theirs[cell["id"]]) for cell in edition["cells"])
    old_sources = {cell["source"] for cell in copy["cells"]}
    new = sum(cell["source"] not in old_sources for cell in course)
    cells = place(own, [cell["id"] for cell in copy["cells"]], course)
    return Merged({**edition, "cells": cells}, kept, len(own), new)


def place(cells: Iterable[Cell], order: list[str], into: list[Cell]) -> list[Cell]:
    """`into` with each of `cells` where `order` (ids) has it: behind its predecessor or, if that is not in
    `into`, before the nearest cell that follows; at the end if none does.
    """
    there = {cell["id"] for cell in into}
    before: defaultdict[str | None, list[Cell]] = defaultdict(list)
    behind: defaultdict[str | None, list[Cell]] = defaultdict(list)
    bucket_of: dict[str, list[Cell]] = {}
    for cell in cells:
        index = order.index(cell["id"])
        previous = order[index - 1] if index else None
        following = next((other for other in order[index + 1 :] if other in there), None)
        if previous in bucket_of:
            bucket = bucket_of[previous]  # a run of them stays together
        else:
            bucket = behind[previous] if previous in there else before[following]
        bucket.append(cell)
        bucket_of[cell["id"]] = bucket
    placed: list[Cell] = []
    for cell in into:
        placed += [*before[cell["id"]], cell, *behind[cell["id"]]]
    return placed + before[None]


def fill_answers(notebook: Notebook, answers: Mapping[str, str]) -> tuple[Notebook, tuple[str, ...]]:
    """The notebook with `answers` (sources by exercise id) in those exercise cells that are still untouched,
    and the ids of the exercises that were filled.
    """
    filled = {
        cell["id"]: exercise
        for cell in notebook["cells"]
        if (exercise := exercise_of(cell, "ex")) in answers and not _is_edited(cell)
    }
    cells = [
        {**cell, "source": answers[filled[cell["id"]]]} if cell["id"] in filled else cell
        for cell in notebook["cells"]
    ]
    return {**notebook, "cells": cells}, tuple(filled.values())


def _merged_cell(theirs: Cell | None, new: Cell) -> Cell:
    if theirs is None:
        return cleared(new)
    same = theirs["source"] == new["source"] and theirs["cell_type"] == new["cell_type"]
    if not same and not _is_edited(theirs):
        return cleared(new)
    return {**theirs, "metadata": {**theirs["metadata"], **new["metadata"]}}


def _is_edited(cell: Cell) -> bool:
    """Whether its source is the learner's. A cell without a `base` never was the course's."""
    return course_metadata(cell).get("base") != digest(cell["source"])
