"""Matrix product of a few rows with a weight, y = x W^T: what decoding one or a few requests consists of.

Bound by reading the weight once. Library products are built around tiles of many rows and take twice as long for
one: here a program holds BLOCK_N whole rows of W, all its loads in flight at once, and reduces them on the spot.
Invariant: accumulated in float32; a row's result does not depend on the rows beside it.

vLLM: csrc/rocm/skinny_gemms.cu does this on AMD; on NVIDIA it relies on cuBLAS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import next_power_of_2

MAX_ROWS = 4  # with more, tensor cores win
MAX_FEATURES = 4096  # a whole row of W must fit a program's registers


@triton.jit
def _few_rows_linear_kernel(
    x, weight, out, x_stride, weight_stride, out_stride, out_features, in_features,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N output features of all rows."""
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    mask = (features < out_features)[:, None] & (columns < in_features)[None, :]
    w_offset = features.to(tl.int64)[:, None] * weight_stride + columns[None, :]
    w = tl.load(weight + w_offset, mask=mask, other=0.0).to(tl.float32)
    for row in tl.static_range(ROWS):
        value = tl.load(x + row * x_stride + columns, mask=columns < in_features, other=0.0).to(tl.float32)
        result = tl.sum(w * value[None, :], axis=1)
        place = out + row * out_stride + features
        tl.store(place, result.to(out.dtype.element_ty), mask=features < out_features)


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T`: x [T, I] with T <= MAX_ROWS, weight [O, I] with I <= MAX_FEATURES -> [T, O].

    Args and meaning: `kernels.reference.few_rows_linear`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_shape("x", x, (None, None))
    launch.check_shape("weight", weight, (None, x.shape[1]))
    launch.check_rows({"x": x, "weight": weight})
    rows, in_features = x.shape
    if rows > MAX_ROWS or in_features > MAX_FEATURES:
        raise ValueError(f"x has shape {list(x.shape)}: expected at most [{MAX_ROWS}, {MAX_FEATURES}].")
    out = torch.empty((rows, len(weight)), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    # Enough programs for the whole device, for narrow outputs too.
    block_n = 4 if len(weight) < 2048 else 8
    with launch.on_device_of(x):
        _few_rows_linear_kernel[(triton.cdiv(len(weight), block_n),)](
            x, weight, out, x.stride(0), weight.stride(0), out.stride(0), len(weight), in_features,
            ROWS=rows, BLOCK_N=block_n, BLOCK_K=next_power_of_2(in_features), num_warps=4,
        )  # fmt: skip
    return out
