"""The gated activation of Llama-like MLPs, silu(gate) * up, in one pass.

Invariant: computed in float32 and rounded once. vLLM: csrc/activation_kernels.cu (`silu_and_mul`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import ELEMENTWISE_BLOCK, next_power_of_2, row_warps


@triton.jit
def _silu_and_mul_kernel(gate_up, out, gate_up_stride, size, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    source = gate_up + row * gate_up_stride + columns
    gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + size, mask=mask, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of gate_up [T, 2 * I], gate first -> [T, I].

    Args and meaning: `kernels.reference.silu_and_mul`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_shape("gate_up", gate_up, (None, None))
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has {gate_up.shape[1]} columns: expected an even number, gate then up.")
    launch.check_rows({"gate_up": gate_up})
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(next_power_of_2(size), ELEMENTWISE_BLOCK)
    with launch.on_device_of(gate_up):
        _silu_and_mul_kernel[(rows, triton.cdiv(size, block))](
            gate_up, out, gate_up.stride(0), size, BLOCK=block, num_warps=row_warps(block)
        )
    return out
