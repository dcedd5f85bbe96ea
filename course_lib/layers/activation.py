"""The gated activation of Llama-like MLPs. vLLM: `model_executor/layers/activation.py` (SiluAndMul)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course_lib.layers.fused import fused_kernels


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for gate_up [T, 2 * I] (gate first) -> [T, I], a new tensor in the same layout."""
    kernels = fused_kernels(gate_up)
    if kernels is not None:
        return kernels.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
