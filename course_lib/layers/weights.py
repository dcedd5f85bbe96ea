"""Where each tensor of a checkpoint goes, and which part of it.

Checkpoints store `q_proj`, `k_proj` and `v_proj`; the engine multiplies by one fused matrix, of which a rank of a
tensor-parallel group holds its share. A `WeightSlot` is the place of one checkpoint tensor: a parameter, the rows of
it that are filled, and the part of the tensor that fills them. Invariant: the slots of a model cover every row of
every parameter exactly once (but for a vocabulary's padding, which is zero), so "all slots filled" means "no
uninitialised weight". vLLM: the `weight_loader` functions and `stacked_params_mapping`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class CheckpointTensor(Protocol):
    """A whole tensor of a checkpoint: a `torch.Tensor`, or one in a file that is read as far as it is asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, part: tuple[slice, ...]) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Rows `rows` of `parameter`, filled by the part `source` of a checkpoint tensor of shape `shape`.

    `rows` is an index of `parameter`; one of an expert's matrix, say, is (expert, rows of that). `source` has a slice
    for each leading dimension; () is the whole tensor. A part of one dimension less than the rows (the norm that all
    heads share) is repeated over them.
    """

    parameter: nn.Parameter
    rows: int | slice | tuple[int | slice, ...]
    shape: tuple[int, ...]
    source: tuple[slice, ...] = ()

    @torch.no_grad()
    def fill(self, tensor: CheckpointTensor) -> None:
        """Copy the part in, cast to the parameter's dtype and device. The tensor's shape was checked before."""
        self.parameter.data[self.rows].copy_(tensor[self.source])


class FusedModule(nn.Module):
    """A module whose parameters each hold several checkpoint tensors, stacked along dimension 0."""

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yield (name beside the module's own in the checkpoint, slot), e.g. ("k_proj.weight", ...)."""
        raise NotImplementedError(type(self).__name__)

    def elsewhere(self) -> Iterator[str]:
        """What such names of tensors start with that other ranks hold, e.g. "experts.3."."""
        yield from ()


class ShardedModule(nn.Module):
    """A module whose parameters hold this rank's share of the checkpoint tensors of the same name."""

    def shards(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yield (parameter's name in the module, slot), e.g. ("weight", ...)."""
        raise NotImplementedError(type(self).__name__)


class OtherStage(nn.Module):
    """Stands for a module that another stage of the pipeline holds; checkpoint tensors below it go there."""


def as_slice(part: range) -> slice:
    """The slice that takes the elements `part`, which must follow each other."""
    return slice(part.start, part.stop)


def stacked_rows(names: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[tuple[str, slice]]:
    """Yield (name, its rows) for parts of the given sizes lying one after another."""
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, slice(start, start + size)
        start += size


def checkpoint_slots(model: nn.Module) -> dict[str, WeightSlot]:
    """Every tensor name that a checkpoint must hold for this rank's part of `model`, with its slot.

    Names are Hugging Face's, e.g. `model.layers.0.self_attn.k_proj.weight`.
    """
    slots: dict[str, WeightSlot] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, FusedModule):
            parent = module_name.rpartition(".")[0]
            slots.update((f"{parent}.{part}".lstrip("."), slot) for part, slot in module.parts())
        elif isinstance(module, ShardedModule):
            slots.update((f"{module_name}.{attribute}", slot) for attribute, slot in module.shards())
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                whole = WeightSlot(parameter, slice(0, len(parameter)), tuple(parameter.shape))
                slots[f"{module_name}.{attribute}".lstrip(".")] = whole
    return slots


def names_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """What the names of tensors start with that only other ranks hold, e.g. `("model.layers.0.", "lm_head.")`."""
    names: list[str] = []
    for module_name, module in model.named_modules():
        if isinstance(module, OtherStage):
            names.append(f"{module_name}.")
        elif isinstance(module, FusedModule):
            parent = module_name.rpartition(".")[0]
            names += (f"{parent}.{start}".lstrip(".") for start in module.elsewhere())
    return tuple(names)
