"""`python3 -m course_lib lab`: the notebooks, opened in JupyterLab.

Invariant: the learner works in `work/`, which git ignores; a notebook there is made once from its
source and never written again, so nobody's edits are lost.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from course_lib.bootstrap.places import REPO_ROOT, child_environment
from course_lib.errors import SetupError

WELCOME = REPO_ROOT / "course_lib" / "teaching" / "welcome"
WORK = REPO_ROOT / "work"


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address instead of opening a browser"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to serve on (default: the first free from 8888)"
    )


def welcome_notebook(source: Path = WELCOME / "welcome.py", work: Path = WORK) -> Path:
    """The learner's copy of the welcome notebook, made if it is not there yet."""
    notebook = work / "welcome.ipynb"
    if not notebook.exists():
        work.mkdir(exist_ok=True)
        partial = work / ".welcome.partial.ipynb"
        command = [
            sys.executable,
            "-m",
            "jupytext",
            "--quiet",
            "--to",
            "ipynb",
            "--output",
            str(partial),
            str(source),
        ]
        if subprocess.run(command, env=child_environment()).returncode != 0:
            raise SetupError(f"{source} could not be made into a notebook for the reason above.")
        os.replace(partial, notebook)
    return notebook


def lab_command(args: argparse.Namespace, notebook: Path) -> list[str]:
    """The JupyterLab command line that opens `notebook` with the repository as its root."""
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={REPO_ROOT}",
        f"--LabApp.default_url=/lab/tree/{notebook.relative_to(REPO_ROOT).as_posix()}",
    ]
    if args.no_browser:
        command.append("--no-browser")
    if args.port is not None:
        command.append(f"--port={args.port}")
    if os.geteuid() == 0:
        command.append("--allow-root")  # containers; Jupyter refuses to start otherwise
    return command


def run_lab(args: argparse.Namespace) -> int:
    command = lab_command(args, welcome_notebook())
    settings = [str(WELCOME / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    environment = child_environment(
        JUPYTER_CONFIG_PATH=os.pathsep.join(filter(None, settings)),
        JUPYTER_PREFER_ENV_PATH="1",  # this environment's kernel, not a namesake in the user's home
    )
    print("Opening JupyterLab. Stop it with Ctrl-C here, twice.", flush=True)
    os.execve(command[0], command, environment)
