"""`python3 -m course_lib test`: pytest over `tests/`, in this process's place.

pytest replaces this process, so its output is live and its exit status is the command's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from course_lib.bootstrap.places import REPO_ROOT


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    parser.epilog = "Anything else goes to pytest: `test -k scheduler -x`, `test tests/setup`."


def pytest_command(quick: bool, extra: Sequence[str]) -> list[str]:
    """The command line; `tests` unless `extra` names files or tests of its own."""
    named = any(os.path.exists(argument.split("::")[0]) for argument in extra if not argument.startswith("-"))
    command = [sys.executable, "-m", "pytest", *([] if named else ["tests"])]
    return [*command, *(["-m", "not slow"] if quick else []), *extra]


def run_test(args: argparse.Namespace, extra: Sequence[str]) -> int:
    os.chdir(REPO_ROOT)
    sys.stdout.flush()
    command = pytest_command(args.quick, extra)
    os.execv(command[0], command)
