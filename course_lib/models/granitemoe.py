"""GraniteMoE (IBM Granite 3.0; PowerMoE, arXiv 2408.13359): Mixtral with four multipliers.

Trained by a recipe (muP, arXiv 2203.03466) in which learning rates found for a small model hold for a large one;
its price is that embeddings, attention scores, what a block adds to the residual stream, and logits are each scaled
by a constant of the configuration. vLLM: `model_executor/models/granitemoe.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.attention.metadata import AttentionMetadata
from course_lib.layers.experts import Experts
from course_lib.layers.moe import MoE, Router
from course_lib.layers.weights import CheckpointTensor, WeightSlot, as_slice
from course_lib.models.causal_lm import IntermediateTensors
from course_lib.models.llama import CosSin, LlamaAttention, LlamaDecoderLayer, check_activation
from course_lib.models.mixture import MixtureForCausalLM


@dataclass(frozen=True, slots=True)
class GateUpSlot(WeightSlot):
    """`source` is the gates' part of a tensor [E, 2 * I, hidden]; the up part, as large, lies I rows further on."""

    @torch.no_grad()
    def fill(self, tensor: CheckpointTensor) -> None:
        experts, gate = self.source
        half, here = self.shape[1] // 2, gate.stop - gate.start
        up = slice(gate.start + half, gate.stop + half)
        self.parameter.data[:, :here].copy_(tensor[experts, gate])
        self.parameter.data[:, here:].copy_(tensor[experts, up])


class GraniteExperts(Experts):
    """Whose checkpoint holds all experts' matrices in two tensors."""

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        experts, inner = as_slice(self.share.experts), as_slice(self.share.inner)
        every = slice(None)
        hidden = self.down.shape[1]
        gate_up_shape = (self.num_experts, 2 * self.intermediate_size, hidden)
        down_shape = (self.num_experts, hidden, self.intermediate_size)
        yield "input_linear.weight", GateUpSlot(self.gate_up, every, gate_up_shape, (experts, inner))
        yield "output_linear.weight", WeightSlot(self.down, every, down_shape, (experts, every, inner))

    def elsewhere(self) -> Iterator[str]:
        yield from ()


class GraniteMoeDecoderLayer(LlamaDecoderLayer):
    mlp_name = "block_sparse_moe"

    def __init__(self, hf_config: Any, layer_idx: int, **where: Any) -> None:
        super().__init__(hf_config, layer_idx, **where)
        self.residual_multiplier = hf_config.residual_multiplier

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        bias, scale = hf_config.attention_bias, hf_config.attention_multiplier
        return LlamaAttention(hf_config, layer_idx, qkv_bias=bias, out_bias=bias, scale=scale, **where)

    def make_mlp(self, hf_config: Any, layer_idx: int, **where: Any) -> MoE:
        check_activation(hf_config)
        hidden, num_experts = hf_config.hidden_size, hf_config.num_local_experts
        return MoE(
            Router(hidden, num_experts, name="router.layer", dtype=where["dtype"], device=where["device"]),
            GraniteExperts(num_experts, hidden, hf_config.intermediate_size, **where),
            top_k=hf_config.num_experts_per_tok,
            renormalize=True,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        cos_sin: CosSin,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            hidden, residual = self.input_layernorm(hidden), hidden
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, cos_sin, metadata) * self.residual_multiplier
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.block_sparse_moe(hidden) * self.residual_multiplier, residual


class GraniteMoeForCausalLM(MixtureForCausalLM):
    layer_class = GraniteMoeDecoderLayer

    def __init__(self, hf_config: Any, **arguments: Any) -> None:
        super().__init__(hf_config, **arguments)
        self.embedding_multiplier, self.logits_scaling = hf_config.embedding_multiplier, hf_config.logits_scaling

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        intermediate: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate is None:
            embeds = self.embedding()(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds = embeds * self.embedding_multiplier
        return super().forward(input_ids, positions, metadata, inputs_embeds, intermediate)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().compute_logits(hidden) / self.logits_scaling
