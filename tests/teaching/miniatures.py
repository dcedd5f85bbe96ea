"""A lesson of two exercises in a temporary repository: both editions of its notebook."""

from __future__ import annotations

from pathlib import Path

from course_lib.teaching import catalogue
from course_lib.teaching.notebook_files import Cell, Notebook, digest, write_notebook

# what course_lib.teaching gives to a notebook, in a few lines: a kernel starts in a second, torch does not
TOYS = """\
answers = {}
def exercise(name):
    return lambda function: answers.update({name: function})
def check(name):
    right = name in answers and answers[name](3) == 9
    verdict = "passed\\nAll 2 cases are right." if right else "not right yet\\nMultiply x by itself."
    print(f"{name} · {verdict}")
"""
STUB = '@exercise("01.{}")\ndef square(x):\n    ...'
SOLVED = STUB.replace("...", "return x * x")
SOURCES = {
    "header": "# A miniature lesson",
    "code-toys": TOYS,
    "md-first": "First.",
    "ex-01-1": STUB.format(1),
    "check-01-1": 'check("01.1")',
    "md-second": "Second.",
    "ex-01-2": STUB.format(2),
    "check-01-2": 'check("01.2")',
    "md-recap": "Recap.",
}


def make_lesson(repository: Path, monkeypatch, number: str = "01") -> catalogue.Lesson:
    """A written lesson of the stage stage1_core, whose files are in `repository`."""
    monkeypatch.setattr(catalogue, "REPO_ROOT", repository)
    lesson = catalogue.Lesson(
        number=number, slug="mini", stage="stage1_core", title="Mini", minutes=45, builds="squares | cubes",
        vllm_example="basic.py", vllm_files=("vllm/entrypoints/llm.py",),
    )  # fmt: skip
    lesson.source.parent.mkdir(parents=True, exist_ok=True)
    lesson.source.touch()
    write_edition(lesson, SOURCES)
    return lesson


def write_edition(lesson: catalogue.Lesson, sources: dict[str, str], source_hash: str = "1") -> None:
    """Both notebooks of an edition whose learner's cells have these `sources`."""
    learner = notebook(sources, source_hash)
    write_notebook(lesson.notebook, learner)
    solved = notebook({**sources, "ex-01-1": SOLVED.format(1), "ex-01-2": SOLVED.format(2)}, source_hash)
    for cell in solved["cells"]:
        if cell["id"].startswith("check-"):
            text = f"{cell['id'][6:].replace('-', '.')} · passed\nAll 2 cases are right.\n"
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}]
            cell["execution_count"] = 1
    write_notebook(lesson.solution_notebook, solved)


def notebook(sources: dict[str, str], source_hash: str) -> Notebook:
    cells = [
        _cell(identifier, source, {"course": {"base": digest(source)}})
        for identifier, source in sources.items()
    ]
    metadata = {"course": {"lesson": "01", "edition": "learner", "source_hash": source_hash}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}


def own(source: str, identifier: str) -> Cell:
    """A cell that the learner added."""
    return _cell(identifier, source, {})


def edit(path: Path, notebook: Notebook, **sources: str) -> None:
    """Save `notebook` with other sources, named by cell id with _ for -, as a learner would."""
    for cell in notebook["cells"]:
        cell["source"] = sources.get(cell["id"].replace("-", "_"), cell["source"])
    write_notebook(path, notebook)


def _cell(identifier: str, source: str, metadata: dict) -> Cell:
    kind = "markdown" if identifier.startswith(("md-", "header")) else "code"
    cell = {"id": identifier, "cell_type": kind, "source": source, "metadata": metadata}
    return cell if kind == "markdown" else {**cell, "outputs": [], "execution_count": None}
