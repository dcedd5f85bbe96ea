"""The experts of one layer: as many gated MLPs of one shape, of which a token goes through a few.

Owns the weights that this rank holds and the products with them. Assignments of tokens to experts are sorted by
expert, so that each expert's weights meet all its tokens in one product: reading weights is what few tokens cost, and
a product per token would read them once per token. On a GPU one Triton launch does all experts (`kernels.triton.
moe_mlp`); elsewhere it is a loop over the experts that have tokens, never over tokens.

A rank holds either whole experts, a contiguous range of them (expert parallelism), or a range of every expert's inner
features (tensor parallelism). Invariant: either way the outputs of all ranks add up to the layer's output.

vLLM: `model_executor/layers/fused_moe/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from course_lib.layers.activation import silu_and_mul
from course_lib.layers.cpu_matmul import is_packed, linear, pack, unpack
from course_lib.layers.few_rows_weight import FewRowsWeight, four_bit_form
from course_lib.layers.fused import gpu_kernels
from course_lib.layers.linear import frozen
from course_lib.layers.weights import FusedModule, WeightSlot, as_slice
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import split_evenly


@dataclass(frozen=True)
class ExpertShare:
    """What one rank holds of a layer's experts."""

    experts: range  # whose weights are here
    inner: range  # which of their intermediate features

    @classmethod
    def of_rank(cls, num_experts: int, intermediate_size: int, parallel: ParallelGroups) -> ExpertShare:
        """Whole experts where there is an expert group; else a slice of all of them."""
        expert, tensor = parallel.expert, parallel.tensor
        if expert.size > 1:
            return cls(split_evenly(num_experts, expert.size)[expert.rank], range(intermediate_size))
        return cls(range(num_experts), split_evenly(intermediate_size, tensor.size)[tensor.rank])


@dataclass(frozen=True)
class PackedMatrix:
    """A weight laid out for this CPU's products, see `cpu_matmul`."""

    weight: torch.Tensor
    few_rows: FewRowsWeight | None

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedMatrix:
        return cls(pack(weight), four_bit_form(weight))


class Experts(FusedModule):
    """`down(silu(gate(x)) * up(x))` of several experts; e of them here, with i inner features each.

    Parameters: `gate_up` [e, 2 * i, hidden], gate first; `down` [e, hidden, i]; None while they are packed.
    """

    # Names of an expert's matrices in the checkpoint: gate, up, down.
    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        parallel: ParallelGroups,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
        self.share = ExpertShare.of_rank(num_experts, intermediate_size, parallel)
        here, inner = len(self.share.experts), len(self.share.inner)
        self.gate_up: nn.Parameter | None = frozen(here, 2 * inner, hidden_size, dtype=dtype, device=device)
        self.down: nn.Parameter | None = frozen(here, hidden_size, inner, dtype=dtype, device=device)
        self.packed: list[tuple[PackedMatrix, PackedMatrix]] = []

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        inner, features = as_slice(self.share.inner), len(self.share.inner)
        hidden = self.down.shape[1]
        tall, wide = (self.intermediate_size, hidden), (hidden, self.intermediate_size)
        gate, up, down = self.names
        for i, expert in enumerate(self.share.experts):
            name = f"experts.{expert}"
            yield f"{name}.{gate}.weight", WeightSlot(self.gate_up, (i, slice(0, features)), tall, (inner,))
            yield f"{name}.{up}.weight", WeightSlot(self.gate_up, (i, slice(features, None)), tall, (inner,))
            yield f"{name}.{down}.weight", WeightSlot(self.down, i, wide, (slice(None), inner))

    def elsewhere(self) -> Iterator[str]:
        for expert in range(self.num_experts):
            if expert not in self.share.experts:
                yield f"experts.{expert}."

    def pack(self) -> None:
        """As `CausalLM.pack_weights`, which calls it."""
        if self.share.experts:
            packed = [
                (PackedMatrix.of(gate_up), PackedMatrix.of(down))
                for gate_up, down in zip(self.gate_up, self.down, strict=True)
            ]
            if any(is_packed(matrix.weight) for pair in packed for matrix in pair):
                self.packed, self.gate_up, self.down = packed, None, None

    def unpack(self, dtype: torch.dtype) -> None:
        """Undo `pack`."""
        if self.packed:
            gate_ups, downs = zip(*self.packed, strict=True)
            self.gate_up, self.down = (
                nn.Parameter(torch.stack([unpack(matrix.weight, dtype) for matrix in matrices]), requires_grad=False)
                for matrices in (gate_ups, downs)
            )
            self.packed = []

    def forward(self, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """What this rank contributes to each token's output.

        x [T, hidden], weights float32 [T, k] and expert_ids int64 [T, k] -> [T, hidden].
        """
        kernels = gpu_kernels(x)
        if kernels is not None:
            return kernels.moe_mlp(
                x, self.gate_up, self.down, expert_ids, weights, first_expert=self.share.experts.start
            )
        return self._expert_by_expert(x, weights, expert_ids)

    def _expert_by_expert(
        self, x: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor
    ) -> torch.Tensor:
        by_expert = expert_ids.flatten().argsort(stable=True)
        tokens, factors = by_expert // expert_ids.shape[1], weights.flatten()[by_expert].unsqueeze(1)
        counts = torch.bincount(expert_ids.flatten(), minlength=self.num_experts).tolist()
        out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        end = sum(counts[: self.share.experts.start])
        for index, expert in enumerate(self.share.experts):
            start, end = end, end + counts[expert]
            if start < end:
                mine = tokens[start:end]
                out.index_add_(0, mine, self._expert(index, x[mine]) * factors[start:end])
        return out.to(x.dtype)

    def _expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            gate_up, down = self.packed[index]
            inner = silu_and_mul(linear(x, gate_up.weight, few_rows=gate_up.few_rows, either_layout=True))
            return linear(inner, down.weight, few_rows=down.few_rows)
        gate_up = linear(x, self.gate_up[index], either_layout=True)  # which the activation takes
        return linear(silu_and_mul(gate_up), self.down[index])
