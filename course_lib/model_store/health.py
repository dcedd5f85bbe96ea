"""What `doctor` says about the model cache: every file of the course model against its checksum."""

from __future__ import annotations

from collections.abc import Iterator

from course_lib.bootstrap.doctor import Finding
from course_lib.errors import CorruptModelError
from course_lib.model_store.cache import cache_root
from course_lib.model_store.course_model import GGUF, GGUF_SHA256, course_model_folder
from course_lib.model_store.manifest import sha256, verify


def check_models() -> Iterator[Finding]:
    """One finding for the cache, one for the converted model, one for the GGUF file."""
    root, folder = cache_root(), course_model_folder()
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.exists() else 0
    yield Finding("model cache", f"{root}, {size / 1e6:.0f} MB (may be deleted: it is made again)")
    if not folder.exists():
        yield Finding(
            "course model",
            "not fetched yet",
            "run `python3 -m course_lib generate Hello` (any command that needs the model fetches it)",
        )
        return
    try:
        verify(folder, checksums=True)
        yield Finding("course model", f"complete, checksums right: {folder}")
    except CorruptModelError as error:
        yield Finding("course model", "damaged", str(error))
    gguf = folder.parent / GGUF
    if gguf.exists() and sha256(gguf) != GGUF_SHA256:
        yield Finding(
            "GGUF file", f"{gguf} is damaged", f"delete {gguf}: it is needed for a new conversion only"
        )
