"""RMS normalisation, with the addition to the residual stream done in the same pass.

A program handles one row. Without the fusion the sum goes to memory, comes back for its mean square, and
comes back again to be scaled; here it is read once and stays in registers. Invariant: the sum is rounded to
the tensors' dtype before it is normalised, exactly as if it had been stored and read again.

vLLM: csrc/layernorm_kernels.cu (`fused_add_rms_norm`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import next_power_of_2, row_warps


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, x_stride, residual_stride, out_stride, size, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
    if ADD:
        added = tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(x + row * x_stride + columns, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, (value * scale * factor).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` row by row; with `residual`, x becomes x + residual first.

    Args and meaning: `kernels.reference.rms_norm`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_shape("x", x, (None, None))
    launch.check_shape("weight", weight, (x.shape[1],))
    rows = {"x": x, "weight": weight}
    if residual is not None:
        launch.check_shape("residual", residual, tuple(x.shape))
        rows["residual"] = residual
    launch.check_rows(rows)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return out
    added = x if residual is None else residual  # not touched without ADD
    block = next_power_of_2(x.shape[1])
    with launch.on_device_of(x):
        _rms_norm_kernel[(len(x),)](
            x, added, weight, out, x.stride(0), added.stride(0), out.stride(0), x.shape[1], eps,
            ADD=residual is not None, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return out
