"""Where each tensor of a checkpoint goes.

Checkpoints store `q_proj`, `k_proj` and `v_proj`; the engine multiplies by one fused matrix. A
`WeightSlot` is the place of one checkpoint tensor: a parameter and the rows of it that the tensor
fills. Invariant: the slots of a model cover every row of every parameter exactly once, so "all slots
filled" means "no uninitialised weight". vLLM: the `weight_loader` functions and `stacked_params_mapping`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Rows `rows` of `parameter`, filled by a checkpoint tensor of shape `shape`.

    A tensor of one dimension less (the norm that all heads share) is repeated over the rows.
    """

    parameter: nn.Parameter
    rows: slice
    shape: tuple[int, ...]

    @torch.no_grad()
    def fill(self, tensor: torch.Tensor) -> None:
        """Copy `tensor` in, cast to the parameter's dtype and device. Its shape was checked before."""
        self.parameter.data[self.rows].copy_(tensor)


class FusedModule(nn.Module):
    """A module whose parameters each hold several checkpoint tensors, stacked along dimension 0."""

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        """Yield (name beside the module's own in the checkpoint, slot), e.g. ("k_proj.weight", ...)."""
        raise NotImplementedError(type(self).__name__)


def stacked_rows(names: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[tuple[str, slice]]:
    """Yield (name, its rows) for parts of the given sizes lying one after another."""
    start = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, slice(start, start + size)
        start += size


def checkpoint_slots(model: nn.Module) -> dict[str, WeightSlot]:
    """Every tensor name that a checkpoint of `model` must hold, with its slot.

    Names are Hugging Face's, e.g. `model.layers.0.self_attn.k_proj.weight`.
    """
    slots: dict[str, WeightSlot] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, FusedModule):
            parent = module_name.rpartition(".")[0]
            slots.update((f"{parent}.{part}".lstrip("."), slot) for part, slot in module.parts())
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                whole = WeightSlot(parameter, slice(0, len(parameter)), tuple(parameter.shape))
                slots[f"{module_name}.{attribute}".lstrip(".")] = whole
    return slots
