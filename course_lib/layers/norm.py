"""RMS normalisation, computed in float32 inside.

`torch.nn.functional.rms_norm` gives bit for bit what transformers' LlamaRMSNorm gives in float32; in
16-bit dtypes it rounds once instead of twice. Invariant: no input is modified, except that the
residual form takes ownership of `x`. vLLM: `model_executor/layers/layernorm.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.layers.fused import fused_kernels
from course_lib.layers.linear import frozen
from course_lib.layers.weights import FusedModule, WeightSlot, stacked_rows


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; weight [size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.eps = eps
        self.weight = frozen(size, dtype=dtype, device=device)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`norm(x)` -> [T, size]; `norm(x, residual)` -> (norm(x + residual), x + residual).

        The sum is written into `x`, which the caller must not use again; `residual` stays as it is.
        """
        kernels = fused_kernels(x)
        if kernels is not None:
            normed = kernels.rms_norm(x, self.weight, self.eps, residual)
            return normed if residual is None else (normed, x)
        if residual is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        x.add_(residual)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps), x


class QKNorm(FusedModule):
    """RMSNorm of every query and key head on its own, in one go (Qwen3).

    The checkpoint's `q_norm` and `k_norm` [D] are repeated per head into one weight [H + Hkv, D].
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.head_counts = (num_heads, num_kv_heads)
        self.weight = frozen(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)

    def forward(self, qk: torch.Tensor) -> torch.Tensor:
        """qk [T, H + Hkv, D] -> the same shape, a new tensor."""
        return F.rms_norm(qk, qk.shape[-1:], eps=self.eps).mul_(self.weight)

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        for name, rows in stacked_rows(("q_norm", "k_norm"), self.head_counts):
            yield f"{name}.weight", WeightSlot(self.weight, rows, (self.weight.shape[1],))
