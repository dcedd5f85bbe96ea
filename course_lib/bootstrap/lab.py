"""JupyterLab, started in this process's place. What it opens is the teaching wing's."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from course_lib.bootstrap.places import REPO_ROOT

SETTINGS = REPO_ROOT / "course_lib" / "teaching" / "welcome" / "jupyter"


def lab_command(page: Path, *, browser: bool = True, port: int | None = None) -> list[str]:
    """The command line that opens `page`, a file or folder; the root is the repository if `page` is in it."""
    root = REPO_ROOT if page.is_relative_to(REPO_ROOT) else page.parent
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        f"--LabApp.default_url=/lab/tree/{page.relative_to(root).as_posix()}",
    ]
    if not browser:
        command.append("--no-browser")
    if port is not None:
        command.append(f"--port={port}")
    if os.geteuid() == 0:
        command.append("--allow-root")  # containers; Jupyter refuses to start otherwise
    return command


def become_jupyterlab(
    page: Path, environment: Mapping[str, str], *, browser: bool, port: int | None
) -> NoReturn:
    """Replace this process by JupyterLab with the course's settings; its kernels get `environment`."""
    command = lab_command(page, browser=browser, port=port)
    settings = filter(None, [str(SETTINGS), environment.get("JUPYTER_CONFIG_PATH")])
    changes = {
        "JUPYTER_CONFIG_PATH": os.pathsep.join(settings),
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not a namesake in the user's home
    }
    os.execve(command[0], command, {**environment, **changes})
