"""The virtual environment: made once, brought up to date when the requirements or the CPU kernels change.

Invariants: the stamp is written last, so an environment with a current stamp is complete; a folder
is emptied only if it carries the mark this module left when it made it; everything between happens
under a lock. Whatever interrupts it, the next run looks at what is there and does the rest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from course_lib.bootstrap.lock import exclusive_lock
from course_lib.bootstrap.packages import LOG, install_requirements
from course_lib.bootstrap.places import (
    CONSTRAINTS,
    CPU_KERNELS,
    REPO_ROOT,
    REQUIREMENTS,
    child_environment,
    running_inside,
    venv_folder,
    venv_python,
)
from course_lib.bootstrap.process import run
from course_lib.errors import SetupError

MARK = "made-by-course_lib.txt"
STAMP = "course-setup.json"
OLDEST_PYTHON = (3, 11)


def ensure_environment(argv: Sequence[str], needs: Sequence[str]) -> None:
    """Return inside a complete environment, or do not return: replace this process by one inside.

    argv: arguments of `python -m course_lib` to start again with.
    needs: modules the command imports; asked for only when `COURSE_VENV=off`.
    Raises SetupError, DownloadError or DiskSpaceError.
    """
    venv = venv_folder()
    if venv is None:
        _require_modules(needs)
        return
    changed = not is_current(venv)
    if changed:
        _refuse_unsupported_machine()
        waiting = "Another set-up is at work here: waiting for it."
        with exclusive_lock(venv.with_name(venv.name + ".lock"), waiting) as descriptor:
            if not is_current(venv):
                _set_up(venv, descriptor)
    if changed or not running_inside(venv):
        python = venv_python(venv)
        if os.environ.get("COURSE_STARTED_IN") == str(venv) and not changed:
            raise SetupError(
                f"{python} does not use the environment it lies in: delete {venv}, then run this again."
            )
        sys.stdout.flush()
        os.execve(
            python, [str(python), "-m", "course_lib", *argv], child_environment(COURSE_STARTED_IN=str(venv))
        )


def is_current(venv: Path) -> bool:
    """Whether the environment is complete and made from today's requirements. Starts no process."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        version = stamp.pop("python")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    there = venv_python(venv).exists() and (venv / "lib" / f"python{version}" / "site-packages").is_dir()
    return there and stamp == _stamp()


def _stamp() -> dict[str, str]:
    kernels = b"\0".join(path.read_bytes() for path in sorted(CPU_KERNELS.glob("*.[ch]*")))
    pins = REQUIREMENTS.read_bytes() + b"\0" + CONSTRAINTS.read_bytes()
    return {
        "requirements": hashlib.sha256(pins).hexdigest(),
        "kernels": hashlib.sha256(kernels).hexdigest(),
        "root": str(REPO_ROOT),
    }


def _set_up(venv: Path, lock_descriptor: int) -> None:
    print(f"Setting up the course's environment in {venv} (once; a few minutes).", flush=True)
    if not _works(venv):
        _make(venv)
    version, site_packages = _describe(venv)
    install_requirements(venv, site_packages, lock_descriptor)
    # the kernel, pytest and scripts anywhere find `course_lib` and `kernels` in this folder
    (site_packages / "course_lib.pth").write_text(f"{REPO_ROOT}\n", encoding="utf-8")
    run([str(venv_python(venv)), "-m", "kernels.cpu.build"], env=child_environment())  # says so if it cannot
    partial = venv / (STAMP + ".partial")
    partial.write_text(json.dumps({**_stamp(), "python": version}), encoding="utf-8")
    os.replace(partial, venv / STAMP)
    print("The environment is ready.", flush=True)


def _works(venv: Path) -> bool:
    """Whether the environment's interpreter starts, is new enough and has pip."""
    probe = f"import sys, pip; sys.exit(0 if sys.version_info >= {OLDEST_PYTHON} else 1)"
    python = venv_python(venv)
    if not python.exists():
        return False
    return (
        subprocess.run([python, "-c", probe], stderr=subprocess.DEVNULL, env=child_environment()).returncode
        == 0
    )


def _make(venv: Path) -> None:
    """Make the environment anew, clearing away the remains of an interrupted attempt."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            "This Python cannot make virtual environments: on Debian or Ubuntu, "
            f"`sudo apt install python{version}-venv`, then run this again."
        )
    if venv.exists() and any(venv.iterdir()):
        if not (venv / MARK).exists():
            raise SetupError(
                f"{venv} is in the way: no working environment for Python 3.11 or newer with pip, and not "
                "made "
                "by this course. Delete it, or name another folder in COURSE_VENV."
            )
        print("  clearing away an unfinished environment", flush=True)
        _empty(venv)
    print("  making the virtual environment", flush=True)
    venv.mkdir(parents=True, exist_ok=True)
    (venv / MARK).write_text(
        "This folder can be deleted; the next course command makes it again.\n", encoding="utf-8"
    )
    if run([sys.executable, "-m", "venv", str(venv)], env=child_environment(), output=venv / LOG) != 0:
        print((venv / LOG).read_text(encoding="utf-8", errors="replace"))
        raise SetupError(
            f"Making the virtual environment in {venv} failed for the reason above: if the disk is full, "
            "free some "
            "space; then run this again."
        )


def _empty(venv: Path) -> None:
    for child in venv.iterdir():
        if child.name == MARK:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _describe(venv: Path) -> tuple[str, Path]:
    """(version "3.11", site-packages folder) of the environment."""
    ask = (
        "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('purelib'),"
        " sep='\\n')"
    )
    answer = subprocess.run(
        [venv_python(venv), "-c", ask], capture_output=True, text=True, check=True, env=child_environment()
    )
    version, folder = answer.stdout.splitlines()
    return version, Path(folder)


def _refuse_unsupported_machine() -> None:
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        raise SetupError(
            "PyTorch has no builds for Intel Macs, nor for an Intel Python on Apple silicon: on Apple "
            "silicon use a "
            "native Python (`python3 -c 'import platform; print(platform.machine())'` says arm64); "
            "otherwise Linux."
        )


def _require_modules(names: Sequence[str]) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"COURSE_VENV=off uses {sys.executable} as it is, and it lacks {', '.join(missing)}: "
            f"`{sys.executable} -m pip install {' '.join(missing)}`, or unset COURSE_VENV."
        )
