"""Notebook files as plain data, read tolerantly and written whole.

Owns what `work/` and its tools need of the notebook format (version 4), with the standard library only, so
that `lab` and `progress` start at once. Invariants: a notebook that `read_notebook` returned has unique cell
ids and sources that are one string each; a file is replaced in one step or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from course_lib.errors import CourseError

Cell = dict[str, Any]
Notebook = dict[str, Any]


class DamagedNotebookError(CourseError):
    """The file is not a notebook of format 4: half written, edited by hand, or something else."""


def read_notebook(path: Path) -> Notebook:
    """The notebook at `path`. Raises DamagedNotebookError, or OSError if the file cannot be read."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4:
            raise ValueError(f"its format is {notebook['nbformat']}, not 4")
        notebook["cells"] = _with_ids([_tidy(cell) for cell in notebook["cells"]])
        notebook["metadata"] = dict(notebook.get("metadata") or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedNotebookError(f"{path} is not a readable notebook ({error}).") from error
    return {**notebook, "nbformat_minor": max(5, int(notebook.get("nbformat_minor") or 0))}


def write_notebook(path: Path, notebook: Notebook) -> None:
    """Write `notebook` to `path` in one step. Raises OSError."""
    write_text(path, json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """`replace_file` with text."""
    replace_file(path, text.encode("utf-8"))


def replace_file(path: Path, data: bytes) -> None:
    """Make `path` (and its folder) hold `data`, in one step. Raises OSError, with the old file untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def cleared(cell: Cell) -> Cell:
    """The cell as if it had never run."""
    return {**cell, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else cell


def digest(source: str) -> str:
    """What the builder stores as a cell's `base`: the SHA-256 of its source, in hexadecimal."""
    return hashlib.sha256(source.encode("utf-8")).hexdigest()


def course_metadata(thing: Cell | Notebook) -> dict[str, Any]:
    """The `course` part of a cell's or a notebook's metadata; empty if it is not from the course."""
    found = thing["metadata"].get("course")
    return found if isinstance(found, dict) else {}


def exercise_ids(notebook: Notebook) -> tuple[str, ...]:
    """The exercises that a notebook of the course checks ("01.2"), in its order."""
    return tuple(exercise for cell in notebook["cells"] if (exercise := exercise_of(cell, "check")))


def exercise_of(cell: Cell, kind: str) -> str | None:
    """The exercise ("01.2") that a cell belongs to as its "ex" or "check" cell, or None."""
    prefix, _, exercise = cell["id"].partition("-")
    return exercise.replace("-", ".") if prefix == kind else None


def _tidy(cell: Cell) -> Cell:
    source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
    tidy = {**cell, "source": source, "metadata": dict(cell.get("metadata") or {})}
    if not isinstance(tidy["cell_type"], str):
        raise ValueError("a cell without a type")
    return tidy


def _with_ids(cells: list[Cell]) -> list[Cell]:
    """Notebooks from other tools may lack ids, and a file merged by hand may repeat them."""
    seen: set[str] = set()
    for cell in cells:
        if not isinstance(cell.get("id"), str) or cell["id"] in seen:
            cell["id"] = f"own-{uuid.uuid4().hex[:10]}"
        seen.add(cell["id"])
    return cells
