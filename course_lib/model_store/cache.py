"""The folder that holds models: where it is, and how something is written into it.

`~/.cache/course_lib` (`XDG_CACHE_HOME` moves it, `COURSE_CACHE` names it outright). Everything in it can
be deleted at any time; a README in it says so. Invariant: what has its final name is complete.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from course_lib.errors import DiskSpaceError, SetupError

README = """This folder belongs to the course (course_lib). Everything in it can be deleted: what is needed is
fetched and converted again, which takes a minute and a network connection.

models/   one folder per model: the converted model (Hugging Face format) and the file it came from
"""
_PARTIAL = ".partial-"


def cache_root() -> Path:
    """The cache folder, which need not exist yet."""
    if os.environ.get("COURSE_CACHE"):
        return Path(os.environ["COURSE_CACHE"]).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "course_lib"


def model_folder(name: str) -> Path:
    """Where the versions of model "org/name" lie: `models/org--name`."""
    return cache_root() / "models" / name.replace("/", "--")


def make_folder(folder: Path) -> None:
    """Make `folder` inside the cache, and the README at the cache's root.

    Raises SetupError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        readme = cache_root() / "README.txt"
        if not readme.exists():
            readme.write_text(README, encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"The model cache {folder} cannot be written ({error.strerror}): name another folder in "
            "COURSE_CACHE."
        ) from error


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise DiskSpaceError, with both figures, before something is written that would not fit."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"{what} needs {needed_bytes / 1e6:.0f} MB in {folder}, where {free_bytes / 1e6:.0f} MB are "
            "free: free some "
            "space, or name a folder on another disk in COURSE_CACHE; then run this again."
        )


@contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A folder to write into, on the same file system as `parent`, removed at the end.

    The caller renames what it made out of it. Leftovers of killed processes are cleared first, so the
    caller must hold the lock of `parent`.
    """
    for leftover in parent.glob(_PARTIAL + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
