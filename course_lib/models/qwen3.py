"""Qwen3 (arXiv 2505.09388), dense: Llama with an RMS norm on each query and key head before rotation.

vLLM: `model_executor/models/qwen3.py`.
"""

from __future__ import annotations

from typing import Any

from course_lib.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from course_lib.models.qwen2 import layer_window


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """Head norms; biases only where `attention_bias` asks for them; windows as in Qwen2."""

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        bias, window = hf_config.attention_bias, layer_window(hf_config, layer_idx)
        return LlamaAttention(
            hf_config, layer_idx, qkv_bias=bias, out_bias=bias, qk_norm=True, sliding_window=window, **where
        )


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3DecoderLayer
