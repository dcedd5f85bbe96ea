"""A notebook run by nbval, in a process of its own: what each code cell printed and what went wrong in it.

Invariant: whatever ends the run, Ctrl-C included, ends pytest and the kernel. nbval as a pytest plugin is the
judge; `cell_reports`, loaded beside it, writes down what it found.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from course_lib.bootstrap.process import on_terminal, run
from course_lib.errors import CourseError

CELL_TIMEOUT_S = 120
LAST_LINES = 15  # of pytest's output, where it could not start


@dataclass(frozen=True)
class CellReport:
    """One code cell: its text output, and what went wrong: in a sentence for a learner, and as nbval tells it."""

    passed: bool
    printed: str = ""
    problem: str = ""
    details: str = ""


NOT_REACHED = CellReport(passed=False, problem="the run did not get there", details="the run did not get there")


def run_nbval(notebook: Path, environment: Mapping[str, str], sanitize: str = "") -> dict[int, CellReport]:
    """Run `notebook` with nbval in lax mode; a report for each code cell it reached, by number from 0.

    `environment` is the kernel's. `sanitize`: nbval's sanitizing rules, for outputs that are compared.
    Raises CourseError, with pytest's last words, if no cell was run.
    """
    with tempfile.TemporaryDirectory(prefix="course-nbval-") as folder, _terminal() as descriptors:
        reports, log, rules = (Path(folder, name) for name in ("reports", "log", "sanitize"))
        reports.touch()
        rules.write_text(sanitize, encoding="utf-8")
        command = [
            sys.executable, "-m", "pytest", "--color=no", "--noconftest", "-c", os.devnull, f"--rootdir={folder}",
            "-p", "no:cacheprovider", "-p", "nbval.plugin", "-p", "course_lib.teaching.lessons.cell_reports",
            "--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT_S}",
            f"--nbval-sanitize-with={rules}", str(notebook),
        ]  # fmt: skip
        alone = {
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "COURSE_CELL_REPORTS": str(reports),
            "COURSE_CELL_PROGRESS": "".join(map(str, descriptors)),
        }
        heartbeat = None if descriptors else f"running {notebook.name.lstrip('.')}"
        run(command, env={**environment, **alone}, pass_fds=descriptors, output=log, heartbeat=heartbeat)
        lines = reports.read_text(encoding="utf-8").splitlines()
        if not lines:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            raise CourseError("\n".join(["nbval started no cell. Its last words:", *said]))
    found = map(json.loads, lines)
    return {report.pop("cell"): CellReport(**report) for report in found}


@contextmanager
def _terminal() -> Iterator[tuple[int, ...]]:
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
