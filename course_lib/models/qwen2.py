"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v, and windows in some layers.

vLLM: `model_executor/models/qwen2.py`.
"""

from __future__ import annotations

from typing import Any

from course_lib.errors import UnsupportedModelError
from course_lib.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM


def layer_window(hf_config: Any, layer_idx: int) -> int | None:
    """Sliding window of one layer in tokens, None for full attention.

    transformers' config has worked `use_sliding_window` and `max_window_layers` into `layer_types` and
    `sliding_window`. UnsupportedModelError for a kind of layer that is neither full nor sliding.
    """
    kind, window = hf_config.layer_types[layer_idx], hf_config.sliding_window
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" and window is not None:
        return window
    raise UnsupportedModelError(
        f"config.json: layer_types[{layer_idx}] is {kind!r} and the sliding window {window}; supported are "
        "'full_attention' and, with use_sliding_window and sliding_window set, 'sliding_attention'."
    )


class Qwen2DecoderLayer(LlamaDecoderLayer):
    """q, k and v have biases, the output projection has none."""

    def make_attention(self, hf_config: Any, layer_idx: int, **where: Any) -> LlamaAttention:
        window = layer_window(hf_config, layer_idx)
        return LlamaAttention(hf_config, layer_idx, qkv_bias=True, sliding_window=window, **where)


class Qwen2ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen2DecoderLayer
