"""Tiny configurations with experts, in which every setting differs from what it is when left out."""

import transformers

from tests.models.test_models_parity import like_llama

EXPERTS = 5  # which neither 2 nor 4 ranks divide


def mixtral(**changes):
    settings = dict(num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None)
    return like_llama(transformers.MixtralConfig, **{**settings, **changes})


def qwen2_moe(**changes):
    settings = dict(
        num_experts=EXPERTS, num_experts_per_tok=3, moe_intermediate_size=36, shared_expert_intermediate_size=52,
        norm_topk_prob=False, mlp_only_layers=[1],
    )  # fmt: skip
    return like_llama(transformers.Qwen2MoeConfig, **{**settings, **changes})


def granite_moe(**changes):
    settings = dict(
        num_local_experts=EXPERTS, num_experts_per_tok=2, embedding_multiplier=3.0, residual_multiplier=0.6,
        attention_multiplier=0.2, logits_scaling=2.5, tie_word_embeddings=True, head_dim=16,
    )  # fmt: skip
    return like_llama(transformers.GraniteMoeConfig, **{**settings, **changes})


CONFIGS = {
    "mixtral": lambda: mixtral(),
    "mixtral-one-layer": lambda: mixtral(num_hidden_layers=1, sliding_window=9, num_experts_per_tok=1),
    "qwen2-moe": lambda: qwen2_moe(),
    "qwen2-moe-sparse-step": lambda: qwen2_moe(
        decoder_sparse_step=2, mlp_only_layers=[], norm_topk_prob=True, qkv_bias=False, use_sliding_window=True,
        sliding_window=7, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite-moe": lambda: granite_moe(),
    "granite-moe-biases": lambda: granite_moe(attention_bias=True, tie_word_embeddings=False, num_experts_per_tok=5),
}  # fmt: skip
