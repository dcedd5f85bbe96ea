"""Linear layers, plain and fused.

One big matrix product is faster than three small ones, so q/k/v and gate/up are each one matrix whose
rows are filled from the checkpoint's separate tensors. Invariant: output features are dimension 0 of
every weight and bias, so a part is a block of rows. Tensor parallelism will divide those rows
(`QKVLinear`, `MergedLinear`) or the input columns (`Linear` after attention and MLP) and is a matter of
this module and its slots alone. vLLM: `model_executor/layers/linear.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from course_lib.layers.cpu_matmul import few_rows_linear, is_few_rows, linear
from course_lib.layers.few_rows_weight import FewRowsWeight
from course_lib.layers.fused import linear_kernels
from course_lib.layers.weights import FusedModule, WeightSlot, stacked_rows


def frozen(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised inference parameter. Memory is only touched when a weight is copied in."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


class Linear(nn.Module):
    """`y = x W^T + b`; weight [out, in], x [T, in] -> [T, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.weight = frozen(out_features, in_features, dtype=dtype, device=device)
        self.bias = frozen(out_features, dtype=dtype, device=device) if bias else None
        self.few_rows: FewRowsWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = linear_kernels(x, self.weight) if self.bias is None else None
        if kernels is not None:
            return kernels.few_rows_linear(x, self.weight)
        return linear(x, self.weight, self.bias, self.few_rows)


class MergedLinear(FusedModule):
    """Several projections of the same input as one: x [T, in] -> [T, sum(out_sizes)].

    `names` are the checkpoint's names of the parts, in the order of `out_sizes`.
    """

    def __init__(
        self,
        in_features: int,
        out_sizes: tuple[int, ...],
        names: tuple[str, ...],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.out_sizes = out_sizes
        self.names = names
        self.weight = frozen(sum(out_sizes), in_features, dtype=dtype, device=device)
        self.bias = frozen(sum(out_sizes), dtype=dtype, device=device) if bias else None
        self.few_rows: FewRowsWeight | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = linear_kernels(x, self.weight) if self.bias is None else None
        if kernels is not None:
            return kernels.few_rows_linear(x, self.weight)
        return linear(x, self.weight, self.bias, self.few_rows)

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        for (name, rows), size in zip(stacked_rows(self.names, self.out_sizes), self.out_sizes, strict=True):
            yield f"{name}.weight", WeightSlot(self.weight, rows, (size, self.weight.shape[1]))
            if self.bias is not None:
                yield f"{name}.bias", WeightSlot(self.bias, rows, (size,))


class QKVLinear(MergedLinear):
    """Query, key and value projections: x [T, hidden] -> [T, (H + 2 * Hkv) * D], q first, then k, then v."""

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        names = ("q_proj", "k_proj", "v_proj")
        super().__init__(hidden_size, sizes, names, bias=bias, dtype=dtype, device=device)


class GateUpLinear(MergedLinear):
    """The two input projections of a gated MLP: x [T, hidden] -> [T, 2 * intermediate], gate first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        sizes = (intermediate_size, intermediate_size)
        super().__init__(hidden_size, sizes, ("gate_proj", "up_proj"), bias=bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result may be a transposed view: what follows, silu(gate) * up, works in either layout."""
        if is_few_rows(x) and not self.weight.is_mkldnn:
            return few_rows_linear(x, self.weight, self.bias)
        return super().forward(x)
