"""Mistakes of tensor parallelism, made on purpose in a loaded model, and a way to see where they set in.

Invariant: behind the block of `spoiled` the model is as it was before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from course_lib.layers.cpu_matmul import unpack
from course_lib.layers.linear import GateUpLinear
from course_lib.models.causal_lm import CausalLM
from course_lib.parallel.group import Group, SoloGroup

SUSPECTS = "ABC"


@contextmanager
def spoiled(model: CausalLM, suspect: str) -> Iterator[None]:
    """Inside the block, this rank's part of a Llama `model` has the fault of one of SUSPECTS, or none.

    Every rank must enter the block, with the same suspect.
    """
    if suspect not in SUSPECTS:
        raise ValueError(f"suspect={suspect!r}: choose one of {', '.join(SUSPECTS)}")
    layers = model.model.layers
    sum_of_attention, gate_up = layers[12].self_attn.o_proj, layers[20].mlp.gate_up_proj
    group, weight, few_rows = sum_of_attention.group, gate_up.weight, gate_up.few_rows
    try:
        if suspect == "B":  # the sum behind an attention is forgotten
            sum_of_attention.group = SoloGroup()
        elif suspect == "C":  # gate and up are cut as one matrix: some ranks have gate rows only, some up rows only
            gate_up.weight, gate_up.few_rows = _cut_as_one(gate_up, model.dtype, layers[20].mlp.down_proj.group), None
        yield
    finally:
        sum_of_attention.group, gate_up.weight, gate_up.few_rows = group, weight, few_rows


def _cut_as_one(gate_up: GateUpLinear, dtype: torch.dtype, group: Group) -> nn.Parameter:
    gate, up = (group.all_gather(half.contiguous()) for half in unpack(gate_up.weight, dtype).chunk(2))
    rows = torch.cat([gate, up]).chunk(group.size)[group.rank]
    return nn.Parameter(rows.clone(), requires_grad=False)


@contextmanager
def residuals(model: CausalLM) -> Iterator[list[torch.Tensor]]:
    """Inside the block, what a pass of a Llama `model` adds up: [T, hidden] after each attention and each MLP, in order."""
    seen: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.append(out[1].clone())))
        hooks.append(layer.register_forward_hook(lambda _, __, out: seen.append(out[0] + out[1])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
