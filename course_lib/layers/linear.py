"""Linear layers: plain, fused, and shared out among the ranks of a tensor-parallel group.

One big matrix product is faster than three small ones, so q/k/v and gate/up are each one matrix whose rows are filled
from the checkpoint's separate tensors. Shared out, these are column-parallel (named after W^T): a rank holds some
rows of each part and computes some output features, without talking to anyone. Behind attention and MLP the layer is
row-parallel: a rank holds the columns that its own features meet, and one all-reduce adds up the ranks' products.
(Megatron-LM, arXiv 1909.08053.)

Invariants: output features are dimension 0 of every weight and bias; in a group of one every share is the whole.
vLLM: `model_executor/layers/linear.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from course_lib.layers.cpu_matmul import linear
from course_lib.layers.few_rows_weight import FewRowsWeight
from course_lib.layers.fused import linear_kernels
from course_lib.layers.weights import FusedModule, ShardedModule, WeightSlot, as_slice, stacked_rows
from course_lib.parallel.group import Group
from course_lib.parallel.layout import split_evenly


def frozen(*shape: int, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """An uninitialised inference parameter. Memory is only touched when a weight is copied in."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def share(size: int, group: Group) -> range:
    """Which of `size` features this rank of `group` holds."""
    return split_evenly(size, group.size)[group.rank]


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
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None, *, either_layout: bool = False) -> torch.Tensor:
        """`x W^T + bias` by the fastest kernel, x [T, in] -> [T, out], a new tensor; `either_layout` as in `linear`."""
        kernels = linear_kernels(x, self.weight) if bias is None else None
        if kernels is not None:
            return kernels.few_rows_linear(x, self.weight)
        return linear(x, self.weight, bias, self.few_rows, either_layout=either_layout)


class RowParallelLinear(Linear, ShardedModule):
    """`y = x W^T + b`, of which each rank has a part of x: x [T, share of in] -> [T, out], on every rank the same.

    weight [out, share of in]; bias [out], which rank 0 adds.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        columns = share(in_features, group)
        super().__init__(len(columns), out_features, bias=bias, dtype=dtype, device=device)
        self.group = group
        self.columns = columns
        self.shape = (out_features, in_features)  # the checkpoint's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias if self.group.rank == 0 else None
        return self.group.all_reduce(self.product(x, bias))

    def shards(self) -> Iterator[tuple[str, WeightSlot]]:
        rows = slice(0, self.shape[0])
        yield "weight", WeightSlot(self.weight, rows, self.shape, (rows, as_slice(self.columns)))
        if self.bias is not None:
            yield "bias", WeightSlot(self.bias, rows, self.shape[:1])


class MergedLinear(Linear, FusedModule):
    """Several projections of the same input as one: x [T, in] -> [T, sum of shares].

    `names` are the checkpoint's names of the parts; `out_sizes` their output features, of which this rank holds
    `shares`.
    """

    def __init__(
        self,
        in_features: int,
        out_sizes: tuple[int, ...],
        shares: tuple[range, ...],
        names: tuple[str, ...],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(in_features, sum(map(len, shares)), bias=bias, dtype=dtype, device=device)
        self.out_sizes = out_sizes
        self.shares = shares
        self.names = names

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        stacked = stacked_rows(self.names, tuple(map(len, self.shares)))
        for (name, rows), size, own in zip(stacked, self.out_sizes, self.shares, strict=True):
            source = (as_slice(own),)
            yield f"{name}.weight", WeightSlot(self.weight, rows, (size, self.weight.shape[1]), source)
            if self.bias is not None:
                yield f"{name}.bias", WeightSlot(self.bias, rows, (size,), source)


class QKVLinear(MergedLinear):
    """Query, key and value projections of this rank's heads: x [T, hidden] -> [T, (H + 2 * Hkv) * D], q first.

    `num_heads` and `num_kv_heads` are all heads when given, and H and Hkv of this rank as attributes. Where there
    are more ranks than KV heads, neighbours hold the same one.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        bias: bool,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        ranks = group.size
        if num_heads % ranks or (num_kv_heads % ranks and ranks % num_kv_heads):
            raise ValueError(
                f"{ranks} tensor-parallel ranks cannot share out {num_heads} query heads and {num_kv_heads} KV "
                "heads: the number of ranks must divide the query heads, and divide or be a multiple of the KV heads"
            )
        replicas = max(1, ranks // num_kv_heads)
        kv_heads = split_evenly(num_kv_heads, ranks // replicas)[group.rank // replicas]
        query = share(num_heads * head_dim, group)
        kv = range(kv_heads.start * head_dim, kv_heads.stop * head_dim)
        kv_size = num_kv_heads * head_dim
        super().__init__(
            hidden_size,
            (num_heads * head_dim, kv_size, kv_size),
            (query, kv, kv),
            ("q_proj", "k_proj", "v_proj"),
            bias=bias,
            dtype=dtype,
            device=device,
        )
        self.num_heads = num_heads // ranks
        self.num_kv_heads = len(kv_heads)


class GateUpLinear(MergedLinear):
    """The two input projections of a gated MLP: x [T, hidden] -> [T, 2 * share of intermediate], gate first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        own = share(intermediate_size, group)
        sizes, names = (intermediate_size, intermediate_size), ("gate_proj", "up_proj")
        super().__init__(hidden_size, sizes, (own, own), names, bias=bias, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The result may be a transposed view: what follows, silu(gate) * up, works in either layout."""
        return self.product(x, self.bias, either_layout=True)
