"""A dense Llama made into a mixture of experts while it is loaded (sparse upcycling, arXiv 2212.05055).

Each MLP becomes several experts: copies of it that differ a little, and a router that has learned nothing. In the
paper that is where training starts; here it is what lets a small model that speaks run through everything that a
mixture of experts runs through. Two experts of a token are weighted to add up to one, so the layer's output is that
of the dense MLP but for the differences, which are small: every output feature of an expert's matrices is scaled by
1 + `STRENGTH` * a normal number.

Scaling whole rows, not single weights, keeps a row's values on the grid they were stored on (see `few_rows_weight`).
Invariant: numbers depend on layer, expert and matrix alone, so every rank derives the same model, whatever part of it
it holds. vLLM has no such model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.errors import UnsupportedModelError
from course_lib.layers.experts import Experts
from course_lib.layers.moe import MoE, Router
from course_lib.layers.weights import CheckpointTensor, WeightSlot, as_slice
from course_lib.models.llama import LlamaDecoderLayer, check_activation
from course_lib.models.mixture import MixtureForCausalLM

STRENGTH = 0.01


def seeded_normal(name: str, *shape: int) -> torch.Tensor:
    """Normal numbers of this shape, float32 on the CPU: always the same ones for the same name."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycledSlot(WeightSlot):
    """Rows `rows` of all experts in `parameter`, each filled by the same tensor, its rows scaled by `factors`."""

    factors: torch.Tensor  # float32 [experts here, rows here]

    @torch.no_grad()
    def fill(self, tensor: CheckpointTensor) -> None:
        part = tensor[self.source].float()
        for expert, factors in zip(self.parameter.data, self.factors, strict=True):
            expert[self.rows].copy_(part * factors[:, None].to(part.device))


class UpcycledExperts(Experts):
    """Whose checkpoint holds one MLP."""

    def __init__(self, layer_idx: int, *sizes: int, **where: Any) -> None:
        super().__init__(*sizes, **where)
        self.layer_idx = layer_idx

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        inner, features = as_slice(self.share.inner), len(self.share.inner)
        hidden, every = self.down.shape[1], slice(None)
        tall, wide = (self.intermediate_size, hidden), (hidden, self.intermediate_size)
        for name, rows in (("gate_proj", slice(0, features)), ("up_proj", slice(features, None))):
            factors = self._factors(name, self.intermediate_size)[:, inner]
            yield f"{name}.weight", UpcycledSlot(self.gate_up, rows, tall, (inner,), factors=factors)
        factors = self._factors("down_proj", hidden)
        yield "down_proj.weight", UpcycledSlot(self.down, every, wide, (every, inner), factors=factors)

    def elsewhere(self) -> Iterator[str]:
        yield from ()

    def _factors(self, name: str, size: int) -> torch.Tensor:
        """float32 [experts here, size]."""
        factors = torch.ones(len(self.share.experts), size)
        for row, expert in zip(factors, self.share.experts, strict=True):
            row += STRENGTH * seeded_normal(f"layer {self.layer_idx} expert {expert} {name}", size)
        return factors


class UpcycledRouter(Router):
    """Drawn, not read: no checkpoint holds it."""

    def __init__(self, layer_idx: int, hidden_size: int, num_experts: int, **where: Any) -> None:
        super().__init__(hidden_size, num_experts, **where)
        weight = seeded_normal(f"layer {layer_idx} router", num_experts, hidden_size) * hidden_size**-0.5
        with torch.no_grad():
            self.weight.copy_(weight)

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        yield from ()


class UpcycledDecoderLayer(LlamaDecoderLayer):
    def make_mlp(self, hf_config: Any, layer_idx: int, **where: Any) -> MoE:
        check_activation(hf_config)
        if getattr(hf_config, "mlp_bias", False):
            raise UnsupportedModelError("config.json: mlp_bias=true, but experts have no biases; do not upcycle it.")
        hidden, num_experts = hf_config.hidden_size, hf_config.num_local_experts
        return MoE(
            UpcycledRouter(layer_idx, hidden, num_experts, dtype=where["dtype"], device=where["device"]),
            UpcycledExperts(layer_idx, num_experts, hidden, hf_config.intermediate_size, **where),
            top_k=hf_config.num_experts_per_tok,
            renormalize=True,
        )


class UpcycledLlamaForCausalLM(MixtureForCausalLM):
    layer_class = UpcycledDecoderLayer
