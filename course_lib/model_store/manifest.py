"""What a converted model consists of: `manifest.json` with the size and SHA-256 of every file.

Sizes are compared whenever a model is opened (microseconds; finds what an interruption or a full disk
truncates); checksums when `doctor` is asked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from course_lib.errors import CorruptModelError

NAME = "manifest.json"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, source: dict[str, str]) -> None:
    """Record every file now in `folder`; `source`: where the model came from."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != NAME
    }
    text = json.dumps({"source": source, "files": files}, indent=2)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def verify(folder: Path, *, checksums: bool) -> None:
    """Raise CorruptModelError naming the first file that is missing, of another size or altered.

    checksums: also read every file (a quarter of a second per 270 MB); else sizes only.
    """
    remedy = f"delete {folder} and run the command again: the model is then made anew."
    try:
        files = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptModelError(f"{folder / NAME} is missing or not readable: {remedy}") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise CorruptModelError(f"{path} is missing: {remedy}")
        if path.stat().st_size != size:
            raise CorruptModelError(f"{path} has {path.stat().st_size} bytes instead of {size}: {remedy}")
        if checksums and sha256(path) != digest:
            raise CorruptModelError(
                f"{path} has been altered (its SHA-256 is not the recorded one): {remedy}"
            )
