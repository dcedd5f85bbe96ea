"""A pytest plugin: what nbval found in each cell of a notebook, as a line of JSON in a file.

`nbval_run` loads it into pytest and names, in environment variables, the file (COURSE_CELL_REPORTS) and a
descriptor of the terminal on which to show the progress (COURSE_CELL_PROGRESS, may be empty). Invariant: a
cell is reported as passed only if it ran to its end, its compared output was the expected one, and nothing
was excused: nbval marks every cell after a time-out as an expected failure; xfail and xpass are no passes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from typing import Any

import pytest

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
MOST_TEXT = 4000  # characters of a cell's output that are worth telling
# what nbval says of a cell that did not end -> what the learner reads
IN_PLAIN_WORDS = {
    "Kernel dead on test start": "the notebook's kernel was gone by then",
    "Failed to interrupt kernel": "Python crashed, or did not let itself be stopped after {limit:.0f} s",
    "seconds exceeded executing cell": "it took longer than {limit:.0f} s and was stopped",
    "waiting for output": "Python crashed, or printed faster than could be read",
}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    # a cell that was stopped at its time limit says nothing about the next ones, if the kernel lives
    if item.parent.timed_out and item.parent.kernel.is_alive():
        item.parent.timed_out = False
    if terminal := os.environ.get("COURSE_CELL_PROGRESS"):
        first_line = item.cell.source.strip().split("\n")[0]
        place = f"cell {item.cell_num + 1} of {len(item.session.items)}"
        os.write(int(terminal), f"\r\033[K  {place}  {first_line[:50]}".encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call" or (report.when == "setup" and report.failed):
        line = {
            "cell": item.cell_num,  # among the code cells, from 0
            "passed": report.passed and not hasattr(report, "wasxfail"),
            "printed": _printed(item),
            "problem": "" if call.excinfo is None else _problem(item, call.excinfo.value),
            "details": _COLOUR.sub("", report.longreprtext)[-MOST_TEXT:],
        }
        with open(os.environ["COURSE_CELL_REPORTS"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report


def _printed(item: Any) -> str:
    texts = (output.get("text", "") for output in item.test_outputs or [])
    return "".join(texts)[:MOST_TEXT]


def _problem(item: Any, error: BaseException) -> str:
    """What nbval says of a cell that did not end, in plainer words; else what the cell raised."""
    for theirs, plain in IN_PLAIN_WORDS.items():
        if theirs in str(error):
            return plain.format(limit=item.config.option.nbval_cell_timeout)
    for output in item.test_outputs or []:
        if output["output_type"] == "error":
            name = "" if output["ename"].startswith("_") else f"{output['ename']}: "
            return f"{name}{output['evalue']}"[:MOST_TEXT]
    return str(error)[:MOST_TEXT]
