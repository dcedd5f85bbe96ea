"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer.

vLLM: `model_executor/models/mixtral.py`.
"""

from __future__ import annotations

from typing import Any

from course_lib.layers.experts import Experts
from course_lib.layers.moe import MoE, Router
from course_lib.models.llama import MistralDecoderLayer, check_activation
from course_lib.models.mixture import MixtureForCausalLM


class MixtralExperts(Experts):
    names = ("w1", "w3", "w2")


class MixtralDecoderLayer(MistralDecoderLayer):
    """The weights of the chosen experts add up to one."""

    mlp_name = "block_sparse_moe"

    def make_mlp(self, hf_config: Any, layer_idx: int, **where: Any) -> MoE:
        check_activation(hf_config)
        hidden, num_experts = hf_config.hidden_size, hf_config.num_local_experts
        return MoE(
            Router(hidden, num_experts, dtype=where["dtype"], device=where["device"]),
            MixtralExperts(num_experts, hidden, hf_config.intermediate_size, **where),
            top_k=hf_config.num_experts_per_tok,
            renormalize=True,
        )


class MixtralForCausalLM(MixtureForCausalLM):
    layer_class = MixtralDecoderLayer
