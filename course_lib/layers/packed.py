"""Weights laid out once, at load time, the way a CPU's matrix product wants to read them.

oneDNN multiplies by blocked tiles of the weight. Given a plain matrix it must gather those tiles on every
call, which for one token or sixty-four costs as much as the arithmetic; given a weight packed beforehand it
streams. A packed weight is an opaque tensor (`is_mkldnn`) of the same shape; it replaces the plain one, so
memory stays the same. Where oneDNN has no packed form for a dtype (float16 without AVX512-FP16, other
processors), weights stay as they are.

Not for float32: the packed product adds up long rows in fewer partial sums than the plain one. Logits of the
course model then differ from transformers' by up to 2.3e-4 instead of 7e-5, and float32 is here to be exact.

vLLM: `vllm/model_executor/layers/utils.py` (`dispatch_cpu_unquantized_gemm`) does this with kernels of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# The batch size oneDNN tunes the layout for. Layouts for 64 and 256 rows were the fastest at every size measured
# from 1 to 1,024 rows; the one for a single row was slower even for a single row.
_ROWS = 64


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether packed products of `dtype` are wanted and work here; found out by trying a tiny one."""
    if device.type != "cpu" or dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = pack(torch.eye(16, dtype=dtype))
        return torch.equal(linear(torch.ones(1, 16, dtype=dtype), weight), torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [out, in] -> the same values in oneDNN's layout, opaque; `.to_dense()` undoes it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x W^T + b`, weight packed or plain. x [T, in] -> [T, out]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
