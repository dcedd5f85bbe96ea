"""From a Hugging Face folder to a model whose every weight is filled exactly once.

Files are mapped, one tensor at a time is cast and copied into its slot, and a file is reopened after
`MAPPED_BYTES` so that pages already copied stop counting as this process's memory: the peak is one copy
of the model and little more. Of each tensor only the part is read that this rank has a slot for. Weights
are always copied, never left mapped, so that a folder that is saved over or deleted cannot change or kill a
running engine. Only safetensors is read: a pickle runs code when it is opened.
vLLM: `model_executor/model_loader/default_loader.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.layers.weights import WeightSlot
from course_lib.models.causal_lm import CausalLM
from course_lib.models.checkpoint_files import find_checkpoint
from course_lib.models.registry import resolve_model_class
from course_lib.parallel.group import ParallelGroups

LOAD_FORMATS = ("auto", "safetensors", "dummy")
MAPPED_BYTES = 64 << 20
DUMMY_STD = 0.02  # transformers' default initializer_range: activations and logits stay finite


def load_model(
    path: str | Path,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    max_model_len: int | None = None,
    load_format: str = "auto",
    seed: int = 0,
    parallel: ParallelGroups | None = None,
) -> CausalLM:
    """Build the architecture that `hf_config` names and fill it from the safetensors files in `path`.

    `max_model_len` defaults to the config's `max_position_embeddings`. `load_format="dummy"` reads no
    file and draws the weights from `seed` (the same on every run with the same device and dtype).
    `parallel` are the groups of this rank, which builds and fills its part of the model; None: all of it.
    Raises CorruptModelError or UnsupportedModelError naming file, tensor and remedy.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} is not one of {', '.join(LOAD_FORMATS)}.")
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization and load_format != "dummy":
        raise UnsupportedModelError(
            f"{path}: the checkpoint is quantized (quantization_config in config.json); choose the "
            "float16 or bfloat16 checkpoint of the same model."
        )
    model_class = resolve_model_class(hf_config)
    positions = max_model_len or hf_config.max_position_embeddings
    model = model_class(hf_config, parallel=parallel, dtype=dtype, device=device, max_model_len=positions)
    if load_format == "dummy":
        fill_randomly(model, seed)
    else:
        _fill_from_files(model, Path(path))
    return model.eval()


def _fill_from_files(model: CausalLM, folder: Path) -> None:
    current = folder

    def tensors() -> Iterator[tuple[str, StoredTensor]]:
        nonlocal current
        for current, names in find_checkpoint(folder).items():
            yield from read_tensors(current, names)

    try:
        filled = model.load_weights(tensors())
    except (CorruptModelError, UnsupportedModelError) as error:
        if str(folder) in str(error):
            raise
        raise type(error)(f"{current}: {error}") from error
    missing = sorted(model.slots.keys() - filled)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        hint = ' (or set "tie_word_embeddings": true in config.json)' if missing == ["lm_head.weight"] else ""
        raise CorruptModelError(
            f"{folder}: no file holds tensor {', '.join(map(repr, missing[:3]))}{more}, which "
            f"{type(model).__name__} needs; download the checkpoint again{hint}."
        )


class StoredTensor:
    """A tensor in a mapped safetensors file. `stored[part]` reads that part of it; `stored[()]` is all of it.

    What it returns is backed by the file and only good until the next tensor is asked for.
    """

    def __init__(self, opened: safe_open, name: str) -> None:
        self._slice = opened.get_slice(name)
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        self.dtype: torch.dtype = self._slice[:0].dtype if self.shape else self._slice[()].dtype

    def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor:
        return self._slice[part]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensors(file: Path, names: set[str] | None = None) -> Iterator[tuple[str, StoredTensor]]:
    """Yield (name, tensor) of a safetensors file, in file order; `names` must be among them."""
    try:
        with safe_open(file, framework="pt") as opened:
            order = opened.offset_keys()
        if missing := sorted((names or set()) - set(order)):
            raise CorruptModelError(
                f"{file}: tensor {missing[0]!r} is not in the file that the index names for it; "
                "index and files belong to different checkpoints: download both again."
            )
        position = 0
        while position < len(order):
            with safe_open(file, framework="pt") as opened:
                mapped = 0
                while position < len(order) and mapped < MAPPED_BYTES:
                    tensor = StoredTensor(opened, order[position])
                    mapped += tensor.nbytes
                    yield order[position], tensor
                    del tensor
                    position += 1
    except (SafetensorError, OSError) as error:
        raise CorruptModelError(
            f"{file}: the file is truncated, altered or unreadable ({error}); "
            "delete it and download it again."
        ) from error


def fill_randomly(model: CausalLM, seed: int) -> None:
    """Draw every tensor that a checkpoint would hold: norms are 1, biases 0, matrices normal with std 0.02.

    Each is drawn whole, from a generator of its own, so every rank of a model on several has its part of the same.
    """
    for name, slot in model.slots.items():
        slot.fill(_dummy_tensor(name, slot, seed))


def _dummy_tensor(name: str, slot: WeightSlot, seed: int) -> torch.Tensor:
    like = slot.parameter
    if "norm" in name:
        return like.new_ones(slot.shape)
    if name.endswith(".bias"):
        return like.new_zeros(slot.shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "little"))
    return like.new_empty(slot.shape).normal_(std=DUMMY_STD, generator=generator)
