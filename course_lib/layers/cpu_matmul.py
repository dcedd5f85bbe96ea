"""Products with weights on a CPU: which way round, and in which layout.

Given a plain matrix, a product must gather tiles of it on every call; given a weight packed once, at load time, it
streams. Where the processor has vectors of sixteen floats (AVX-512), there is a layout and a product of our own
(`kernels/cpu`): for bfloat16 if it also multiplies pairs of them (AVX512-BF16), and for float32 weights that are
float16 numbers, as models are stored, which are packed as such. All products of the course model, two cores, in ms:

    rows                              1      8     16     32     64    512
    bfloat16, ours                  8.4    8.3   11.9   21.9     41    325
    bfloat16, oneDNN's packed      14.0   14.7   18.8   29.1     55    348
    float32 as float16, ours        8.7   14.7   28.2   54.2    105    831
    float32, plain                 12.2   26.3   41.3   73.5    130    895

That is 32 GB/s for few rows, and 423 of 426 GFLOP/s in bfloat16 for many. Elsewhere oneDNN packs and multiplies; where
it has no packed form for a dtype (float16 without AVX512-FP16, other processors), weights stay as they are. A packed
weight is an opaque tensor of the same shape, which replaces the plain one. Products of a few rows may have a form of
their own beside it (`few_rows_weight`).

Other float32 weights stay plain. Up to 64 rows go to a kernel of our own that reads each weight once; MKL, at its
best way round, took 68 ms for 8 rows and 75 for 16. Where it is not compiled, and for more rows, MKL serves, whose
product of a few rows with a large matrix is slow: two rows took six to eight times as long as with the factors
exchanged, sixty-four rows 1.3 to 1.5 times. So there y = x W^T is computed as y^T = W x^T, and one row as two equal
ones. oneDNN does not pack float32 here: it adds up long rows in fewer partial sums than MKL. Logits of the course model
then differ from transformers' by up to 2.3e-4 instead of 7e-5, and float32 is here to be exact.

vLLM: `vllm/model_executor/layers/utils.py` (`dispatch_cpu_unquantized_gemm`) has kernels of its own for this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course_lib.layers.few_rows_weight import FewRowsWeight, as_stored_half
from course_lib.layers.fused import fused_kernels, packing_kernels
from kernels.cpu import compiled_kernels

PACKED_DTYPE = torch.uint16  # of weights in our own layout, which nothing else may compute with
# The batch size oneDNN tunes the layout for. Layouts for 64 and 256 rows were the fastest at every size measured
# from 1 to 1,024 rows; the one for a single row was slower even for a single row.
_ROWS = 64
# Up to so many rows MKL's exchanged product pays even when its result must be transposed back.
_FEW_ROWS = 128
# Up to so many rows our own product is clearly the faster; at 128 the two are equal.
_OWN_ROWS = 64


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products of `dtype` are wanted and work here; found out by trying a tiny one."""
    if device.type != "cpu":
        return False
    try:
        weight = pack(torch.eye(16, dtype=dtype))
        product = linear(torch.ones(1, 16, dtype=dtype), weight)
        return is_packed(weight) and torch.equal(product, torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] -> the same values in the layout of the fastest product, opaque, [out, in]; `unpack` undoes it.

    The weight itself if there is none.
    """
    weight, kernels = weight.detach(), packing_kernels(weight.dtype)
    if weight.dtype == torch.float32:
        matrix = None if kernels is None else as_stored_half(weight)
        return weight if matrix is None else kernels.pack_weight(matrix)
    if kernels is not None and weight.shape[1] % 2 == 0:
        return kernels.pack_weight(weight.contiguous())
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `pack` laid it out."""
    return weight.dtype == PACKED_DTYPE or weight.is_mkldnn


def unpack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The plain weight, of `dtype`, of a packed one; a plain one as it is."""
    if weight.dtype == PACKED_DTYPE:
        stored = torch.float16 if dtype == torch.float32 else dtype
        return compiled_kernels().unpack_weight(weight, stored).to(dtype)
    return weight.to_dense() if weight.is_mkldnn else weight


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    few_rows: FewRowsWeight | None = None,
    *,
    either_layout: bool = False,
) -> torch.Tensor:
    """`x W^T + b`, weight packed or plain, `few_rows` its form for few rows. x [T, in] -> [T, out].

    Contiguous, or with `either_layout` perhaps a transposed view, where that saves a copy.
    """
    if few_rows is not None and 0 < x.shape[0] <= few_rows.most_rows:
        product = few_rows.multiply(x)
        return product if bias is None else product.add_(bias)
    if weight.dtype == PACKED_DTYPE:
        return compiled_kernels().packed_linear(x.contiguous(), weight, bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if _is_few_rows(x):
        product = _few_rows_linear(x, weight, bias)
        return product if either_layout else product.contiguous()
    return F.linear(x, weight, bias)


def _is_few_rows(x: torch.Tensor) -> bool:
    """Whether `_few_rows_linear` is the faster way for x [T, in]."""
    return 0 < x.shape[0] <= _FEW_ROWS and x.is_cpu and x.dtype == torch.float32 and torch.backends.mkl.is_available()


def _few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b` for x [T, in] -> [T, out], contiguous or, without kernels of our own, a transposed view."""
    kernels = fused_kernels(x)
    if kernels is not None and weight.is_contiguous() and x.shape[0] <= _OWN_ROWS:
        product = kernels.few_rows_linear(x, weight)
        return product if bias is None else product.add_(bias)
    if x.shape[0] == 1:
        return _few_rows_linear(torch.cat((x, x)), weight, bias)[:1]
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias[:, None], weight, x.t()).t()
