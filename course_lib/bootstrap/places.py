"""Where things are: the repository, its virtual environment, the interpreter inside.

`COURSE_VENV=off` means "this interpreter, as it is" (GPU machines, Colab, containers); a path means
"that environment instead of `.venv`".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = REPO_ROOT / "requirements.txt"
CONSTRAINTS = REPO_ROOT / "constraints.txt"
CPU_KERNELS = REPO_ROOT / "kernels" / "cpu"


def venv_folder() -> Path | None:
    """The environment to use, or None when `COURSE_VENV=off`."""
    setting = os.environ.get("COURSE_VENV", "").strip()
    if setting.lower() == "off":
        return None
    # not resolved: a link to an environment elsewhere keeps its own name
    return Path(os.path.abspath(os.path.expanduser(setting))) if setting else REPO_ROOT / ".venv"


def venv_python(venv: Path) -> Path:
    """The interpreter of an environment (which need not exist yet)."""
    return venv / "bin" / "python"


def running_inside(venv: Path) -> bool:
    """Whether this very process is the environment's interpreter."""
    return os.path.realpath(sys.prefix) == os.path.realpath(venv)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for another interpreter: ours, less what is true of this interpreter only."""
    environment = {**os.environ, **changes}
    # OpenMP's threads wait by spinning, and take the cores from each other as soon as a second program computes:
    # both then run ten times slower instead of two. Sleeping at once costs 20 to 30 % when nothing else runs;
    # a short spin costs 5 to 10 % and loses nothing beside others.
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")
    for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):  # the second is set by macOS framework builds
        environment.pop(name, None)
    return environment
