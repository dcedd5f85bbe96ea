"""A second form of a weight, for products of few rows on a CPU, which are bound by reading it.

float32 is what weights of a CPU's model are computed with, seldom what they are stored in. Where every value is a
float16, as in the course model's file, few rows are multiplied with a float16 copy, which is half as long to read and
gives the same result. Measured with two AVX-512 cores, all products of the course model's layers: 6.9 instead of 13.0
ms for 1 row, 8.3 instead of 14.9 for 4, 14.9 instead of 19.3 for 8; at 12 rows both compute equally long. Where such
weights are packed as float16 (`cpu_matmul`), that serves any number of rows, and there is no second form.

bfloat16: the course model ships in 4 bits (GGUF's Q4_1: groups of 32 values on a grid of 16 points, `minimum + step *
q`), and bfloat16 reads four times the bytes that carry its information. So where a weight lies on such a grid, that is
found out when it is packed, `q` is read back, and products of few rows use torch's 4-bit kernel: 4 ms for 1 row, 6.4
for 4 and 11 for 8, where our own packed product (`cpu_matmul`) takes 7 for any of these and oneDNN's 12 to 13. The head
is not in 4 bits in that file. Where oneDNN multiplies, it has a float16 copy for one row: torch's matrix-vector product
reads float16 at 20 to 30 GB/s here and bfloat16 at 8 to 12.

Invariant: this is no quantization. A form is made only if it gives back every value, the 4-bit one to within bfloat16's
own rounding; other weights have none. vLLM reads Q4_1 with kernels of its own (`csrc/quantization/gguf`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from course_lib.layers.fused import packing_kernels
from kernels.cpu import compiled_kernels

GROUP = 32  # values along the input dimension that share a grid; that of GGUF's formats
_LEVELS = 16
_OUTPUTS_MULTIPLE = 16  # of output features, which the kernel computes in tiles
_ROUNDING = 2.0**-7  # a value and its grid are rounded to bfloat16 once each: 2^-8 of the largest, twice
_MOST_ROWS_BESIDE_OWN_PRODUCT, _MOST_ROWS_BESIDE_ONEDNN = 4, 8  # from there on they are faster than 4 bits
_VALUES_AT_A_TIME = 1 << 18  # looked at together: what fits a core's cache


@dataclass(frozen=True)
class FourBitWeight:
    """A weight [out, in] as torch's 4-bit kernel reads it (ATen: `int4mm_kernel.cpp`)."""

    nibbles: torch.Tensor  # uint8, opaque: two values a byte
    grids: torch.Tensor  # bfloat16 [in / GROUP, out, 2]: step, and the value of q = 8
    most_rows: int

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x bfloat16 [T, in], T <= most_rows -> [T, out]."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.nibbles, GROUP, self.grids)


@dataclass(frozen=True)
class HalfWeight:
    """A weight float16 [out, in]."""

    most_rows = 1
    matrix: torch.Tensor

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, in] -> [1, out] in x's dtype."""
        return torch.mv(self.matrix, x[0].half())[None].to(x.dtype)


@dataclass(frozen=True)
class StoredHalfWeight:
    """A float32 weight [out, in] all of whose values are float16 numbers, as such."""

    most_rows = 8
    matrix: torch.Tensor

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x float32 [T, in], T <= most_rows -> float32 [T, out]."""
        return compiled_kernels().few_rows_linear(x.contiguous(), self.matrix)


FewRowsWeight = FourBitWeight | HalfWeight | StoredHalfWeight


def few_rows_form(weight: torch.Tensor) -> FewRowsWeight | None:
    """The form of a weight [out, in] on a CPU that lies on a coarser grid than its dtype's, if it does."""
    return four_bit_form(weight) or stored_half_form(weight)


def stored_half_form(weight: torch.Tensor) -> StoredHalfWeight | None:
    """weight float32 [out, in] on a CPU -> its float16 form; None if that is inexact, needless, or has no kernel."""
    if weight.dtype != torch.float32 or compiled_kernels() is None or packing_kernels(torch.float32) is not None:
        return None
    matrix = as_stored_half(weight)
    return None if matrix is None else StoredHalfWeight(matrix)


def as_stored_half(weight: torch.Tensor) -> torch.Tensor | None:
    """weight float32 [out, in] -> the same values in float16; None if some are no float16 numbers."""
    matrix = torch.empty(weight.shape, dtype=torch.float16)
    rows = max(1, _VALUES_AT_A_TIME // weight.shape[1])
    for part, half in zip(weight.detach().split(rows), matrix.split(rows), strict=True):
        wide = half.copy_(part).float()
        if not torch.equal(wide, part) or not wide.sum().isfinite():  # so many float16 numbers do not overflow
            return None
    return matrix


def half_form(weight: torch.Tensor) -> HalfWeight | None:
    """weight bfloat16 [out, in] on a CPU -> its float16 form; None if it would overflow, or save nothing."""
    if not _has_fast_kernels() or weight.dtype != torch.bfloat16 or packing_kernels(torch.bfloat16) is not None:
        return None
    matrix = weight.detach().half()
    return HalfWeight(matrix) if matrix.isfinite().all() else None


def four_bit_form(weight: torch.Tensor) -> FourBitWeight | None:
    """weight bfloat16 [out, in] on a CPU -> its 4-bit form; None if it has none, or the processor no kernel."""
    outputs, inputs = weight.shape
    if not _has_fast_kernels() or weight.dtype != torch.bfloat16 or inputs % GROUP or outputs % _OUTPUTS_MULTIPLE:
        return None
    parts = []
    for rows in weight.split(max(1, _VALUES_AT_A_TIME // inputs)):
        part = _grid(rows)
        if part is None:  # which the first rows of most weights tell
            return None
        parts.append(part)
    q, step, middle = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    grids = torch.stack((step, middle), dim=-1).transpose(0, 1).contiguous()
    nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    beside_own = packing_kernels(torch.bfloat16) is not None
    return FourBitWeight(nibbles, grids, _MOST_ROWS_BESIDE_OWN_PRODUCT if beside_own else _MOST_ROWS_BESIDE_ONEDNN)


def _has_fast_kernels() -> bool:
    """Elsewhere the kernels are plain loops."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(q int32 [out, in], step and value of q = 8 bfloat16 [out, in / GROUP]), or None if off the grid."""
    values = weight.float().view(weight.shape[0], -1, GROUP)
    low, high = values.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (_LEVELS - 1)
    q = ((values - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_()
    # low and high are rounded; the line through all points of the group is nearer to what was there before
    centred = q - q.mean(dim=-1, keepdim=True)
    mean = values.mean(dim=-1, keepdim=True)
    spread = centred.square().sum(dim=-1, keepdim=True)
    step = torch.where(spread > 0, (centred * values).sum(dim=-1, keepdim=True) / spread, step)
    step = step.bfloat16()
    middle = (mean + step * (_LEVELS / 2 - q.mean(dim=-1, keepdim=True))).bfloat16()
    error = (step * (q - _LEVELS / 2) + middle - values).abs().amax(dim=-1, keepdim=True)
    if (error > _ROUNDING * torch.maximum(low.abs(), high.abs())).any():
        return None
    return q.view_as(weight).int(), step.squeeze(-1), middle.squeeze(-1)
