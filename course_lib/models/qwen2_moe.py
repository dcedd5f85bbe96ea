"""Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671): Qwen2 with many small experts, and one that all tokens share.

vLLM: `model_executor/models/qwen2_moe.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from course_lib.layers.activation import silu_and_mul
from course_lib.layers.experts import Experts
from course_lib.layers.linear import Linear
from course_lib.layers.moe import MoE, Router
from course_lib.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, check_activation
from course_lib.models.mixture import MixtureForCausalLM
from course_lib.models.qwen2 import layer_window


class SharedExpert(LlamaMLP):
    def contribution(self, hidden: torch.Tensor) -> torch.Tensor:
        """This tensor rank's part of the output, not yet added up: [T, N] -> [T, N]."""
        return self.down_proj.product(silu_and_mul(self.gate_up_proj(hidden)), None)


class Qwen2MoeBlock(MoE):
    """Routed experts, plus a shared one that each token takes as much of as its own gate says."""

    def __init__(self, hf_config: Any, **where: Any) -> None:
        check_activation(hf_config)
        hidden, num_experts = hf_config.hidden_size, hf_config.num_experts
        plain = dict(dtype=where["dtype"], device=where["device"])
        super().__init__(
            Router(hidden, num_experts, **plain),
            Experts(num_experts, hidden, hf_config.moe_intermediate_size, **where),
            top_k=hf_config.num_experts_per_tok,
            renormalize=hf_config.norm_topk_prob,
        )
        shared_size = hf_config.shared_expert_intermediate_size
        self.shared_expert = SharedExpert(hf_config, bias=False, intermediate_size=shared_size, **where)
        self.shared_expert_gate = Linear(hidden, 1, bias=False, **plain)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shared = torch.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert.contribution(hidden)
        return self.exchange.combine(self.contribution(self.exchange.dispatch(hidden)), shared)


class Qwen2MoeDecoderLayer(LlamaDecoderLayer):
    """Attention as in Qwen2; a plain MLP in some layers."""

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        window, bias = layer_window(hf_config, layer_idx), hf_config.qkv_bias
        return LlamaAttention(hf_config, layer_idx, qkv_bias=bias, sliding_window=window, **where)

    def make_mlp(self, hf_config: Any, layer_idx: int, **where: Any) -> nn.Module:
        is_sparse = (layer_idx + 1) % hf_config.decoder_sparse_step == 0
        if is_sparse and hf_config.num_experts > 0 and layer_idx not in hf_config.mlp_only_layers:
            return Qwen2MoeBlock(hf_config, **where)
        return LlamaMLP(hf_config, bias=False, **where)


class Qwen2MoeForCausalLM(MixtureForCausalLM):
    layer_class = Qwen2MoeDecoderLayer
