"""Which files of a folder hold the weights.

Either `model.safetensors`, or the shards that `model.safetensors.index.json` lists. Everything else is
refused with the reason, before anything is read. vLLM: `model_executor/model_loader/weight_utils.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

from course_lib.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_checkpoint(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of `folder`, each with the tensors the index promises in it (None: no index)."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder; give the folder that holds config.json.")
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    if shards := sorted(file.name for file in folder.glob("*.safetensors")):
        raise CorruptModelError(
            f"{folder} holds {', '.join(shards[:3])} but neither {SINGLE} nor {INDEX}; download the missing "
            f"one, or rename the file to {SINGLE} if it holds the whole model."
        )
    if pickles := sorted(file.name for pattern in PICKLES for file in folder.glob(pattern)):
        raise UnsupportedModelError(
            f"{folder / pickles[0]} is a pickle, which can run any code when opened, and the folder has no "
            "safetensors; convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise ModelNotFoundError(
        f"{folder} holds no weights; it should hold {SINGLE}, or {INDEX} and its shards."
    )


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str] | None] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file:
                raise CorruptModelError(
                    f"{index}: shard {file!r} lies outside the folder; download the index again."
                )
            shards.setdefault(index.parent / file, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptModelError(
            f"{index}: not a safetensors index ({error}); delete it and download it again."
        ) from error
    for file in shards:
        if not file.is_file():
            raise CorruptModelError(f"{file}: missing, but {index.name} names it; download this shard again.")
    return shards
