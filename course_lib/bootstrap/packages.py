"""Install the pinned requirements into the environment, with the user's own pip configuration.

Invariant: while pip is at work a file says so, and only a finished run removes it. pip takes a package
for installed when its metadata is there, which an interrupted run may have copied before the rest; so
if the file is found, packages that are not whole are forgotten first and pip installs them again.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from course_lib.bootstrap import torch_index
from course_lib.bootstrap.pip_runs import run_pip
from course_lib.bootstrap.places import REQUIREMENTS, venv_python
from course_lib.errors import DiskSpaceError

LOG = "course-setup.log"
UNFINISHED = "course-setup.unfinished"
GB = 10**9
# what ends up on the disk (2 GB; with CUDA 7 GB) and the files pip keeps on the way there
NEEDED_BYTES_CPU, NEEDED_BYTES_CUDA = 4 * GB, 12 * GB


def install_requirements(venv: Path, site_packages: Path, lock_descriptor: int) -> None:
    """Bring the environment to the pinned versions; returns when it is there.

    lock_descriptor: handed to pip, so that the set-up lock lasts as long as pip does.
    Raises DiskSpaceError, DownloadError or SetupError.
    """
    unfinished = venv / UNFINISHED
    if unfinished.exists():
        for name in forget_half_installed(site_packages):
            print(f"  {name} was left half installed: installing it again", flush=True)
    refuse_full_disk(venv, NEEDED_BYTES_CUDA if torch_index.has_nvidia_gpu() else NEEDED_BYTES_CPU)
    arguments = torch_index.torch_arguments()
    print("  installing packages (JupyterLab, PyTorch, Transformers, …)", flush=True)
    unfinished.touch()
    # Not byte-compiled ahead: Python compiles what is really imported when it is, in a fifth of the time.
    run_pip(
        str(venv_python(venv)),
        ["install", "--no-user", "--no-compile", "-r", str(REQUIREMENTS), *arguments],
        log=venv / LOG,
        doing="installing packages",
        lock_descriptor=lock_descriptor,
    )
    unfinished.unlink()


def refuse_full_disk(folder: Path, needed_bytes: int) -> None:
    """Raise DiskSpaceError, with both figures, if `folder`'s disk has less than `needed_bytes` free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"{folder} needs {needed_bytes / GB:.1f} GB of free disk space and there are "
            f"{free_bytes / GB:.1f} GB: free "
            "some, or choose another disk with COURSE_VENV (packages) or COURSE_CACHE (models); then run "
            "this again."
        )


def forget_half_installed(site_packages: Path) -> list[str]:
    """Remove the metadata of packages that are not whole; returns their names.

    pip writes INSTALLER after a package's last file, and RECORD lists the files.
    """
    for stashed in site_packages.glob("~*"):  # where pip keeps the old version during an upgrade
        shutil.rmtree(stashed, ignore_errors=True)
    forgotten = []
    for metadata in sorted(site_packages.glob("*.dist-info")):
        if not _is_whole(metadata, site_packages):
            shutil.rmtree(metadata)
            forgotten.append(metadata.name.removesuffix(".dist-info"))
    return forgotten


def _is_whole(metadata: Path, site_packages: Path) -> bool:
    if not (metadata / "INSTALLER").exists() or not (metadata / "RECORD").exists():
        return False
    with (metadata / "RECORD").open(newline="", encoding="utf-8") as record:
        files = [row[0] for row in csv.reader(record) if row]
    return all((site_packages / name).exists() for name in files if not name.endswith(".pyc"))
