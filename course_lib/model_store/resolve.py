"""A model's name → a local folder in Hugging Face's format.

Three kinds of names: a folder; the course model's id, which needs only the Python package index; any
other id, which needs a Hugging Face hub that can be reached (or its cache). Imports nothing heavy.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from course_lib.errors import ModelNotFoundError, UnsupportedModelError
from course_lib.model_store.course_model import MODEL as COURSE_MODEL
from course_lib.model_store.course_model import ensure_course_model

# safetensors only: a pickle (.bin, .pt) runs code when it is loaded
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")
OFFLINE_CHOICE = f"{COURSE_MODEL!r}, which needs only the Python package index, or a folder on this machine"


def resolve_model(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, progress: bool = True
) -> Path:
    """The folder of a model: config.json, tokenizer files, *.safetensors.

    name_or_path: a folder, the course model's id, or a hub id "org/name".
    revision: a branch, tag or commit on the hub. Given with the course model's id, it asks the hub for
        the original weights instead of the converted ones. A folder has none.
    Raises ModelNotFoundError, CorruptModelError, UnsupportedModelError, DownloadError, DiskSpaceError;
    ValueError for a revision of a folder.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name.strip():
        raise ModelNotFoundError(
            f"model must name a folder or a hub id, not {name_or_path!r}: try {OFFLINE_CHOICE}."
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} chooses a version on the hub, and {name} is a folder: leave revision out, "
                "or give a hub id"
            )
        return _checked(folder)
    if folder.is_file():
        raise UnsupportedModelError(
            f"{name} is a file: model takes a folder in Hugging Face's format (config.json and "
            "*.safetensors), "
            f"or try {OFFLINE_CHOICE}."
        )
    if name == COURSE_MODEL and revision is None:
        return ensure_course_model(progress)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"There is no folder {name}: check the path, or try {OFFLINE_CHOICE}.")
    return _from_hub(name, revision)


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        hint = " (it holds a GGUF file, another format)" if any(folder.glob("*.gguf")) else ""
        raise ModelNotFoundError(
            f"{folder} has no config.json{hint}: model takes a folder in Hugging Face's format, as "
            f"`save_pretrained` writes it. Or try {OFFLINE_CHOICE}."
        )
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    # the same letters in another case, or half of the name: say so before asking a network
    short = {COURSE_MODEL.lower(): COURSE_MODEL, COURSE_MODEL.split("/")[1].lower(): COURSE_MODEL}
    near = difflib.get_close_matches(name.lower(), short, n=1, cutoff=0.85) if revision is None else []
    hint = f"did you mean {COURSE_MODEL!r}?" if near else f"use {OFFLINE_CHOICE}."
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _checked(Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES))))
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{name!r} is neither a folder nor a hub id of the form org/name: {hint}"
        ) from error
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name!r} is given out only to those who accepted its licence on the hub: accept it there and "
            "run "
            f"`hf auth login`, or {hint}"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{name!r} has no revision {revision!r} on the hub: check revision."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{name!r} is no folder here, and the Hugging Face hub could not be reached to look for it: "
            f"{hint}"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ModelNotFoundError(
            f"The hub has no model {name!r} (or it is private: `hf auth login`): {hint}"
        ) from error
    except OSError as error:  # requests' and httpx's errors are OSErrors, or are wrapped in one
        raise ModelNotFoundError(
            f"{name!r} is no folder here, and fetching it from the hub failed ({type(error).__name__}): "
            f"{hint}"
        ) from error
