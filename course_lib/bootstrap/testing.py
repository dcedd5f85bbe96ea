"""`python3 -m course_lib test`: pytest over `tests/`, in this process's place, as many tests at once as there are cores.

pytest replaces this process, so its output is live and its exit status is the command's. What names files or tests
of its own runs one after another: there is less to gain, and the output stays in order.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.bootstrap.process import usable_cores

MOST_WORKERS = 4  # of which each may hold the course model: 1.5 GB


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    parser.epilog = "Anything else goes to pytest: `test -k scheduler -x`, `test tests/setup`."


def pytest_command(quick: bool, extra: Sequence[str]) -> list[str]:
    """The command line; `tests` unless `extra` names files or tests of its own."""
    named = any(os.path.exists(argument.split("::")[0]) for argument in extra if not argument.startswith("-"))
    command = [sys.executable, "-m", "pytest", *([] if named else ["tests", *_at_once(extra)])]
    return [*command, *(["-m", "not slow"] if quick else []), *extra]


def _at_once(extra: Sequence[str]) -> list[str]:
    """Options of pytest-xdist; none where it is missing or would be in the way of what was asked for."""
    workers = min(usable_cores(), MOST_WORKERS)
    in_the_way = any(argument.startswith(("-n", "--dist", "--pdb", "-s", "-p")) for argument in extra)
    if workers < 2 or in_the_way or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(workers), "--dist", "worksteal"]


def run_test(args: argparse.Namespace, extra: Sequence[str]) -> int:
    os.chdir(REPO_ROOT)
    sys.stdout.flush()
    command = pytest_command(args.quick, extra)
    os.execv(command[0], command)
