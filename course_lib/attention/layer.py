"""The attention layer that models contain: a backend and this layer's part of the cache.

Models know neither. The runner binds both after loading, which is what lets the same model code run
on plain torch, on Triton, and with any cache layout.

vLLM: `vllm/model_executor/layers/attention/attention.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from course_lib.attention.backend import AttentionBackend, KVCache
from course_lib.attention.metadata import AttentionMetadata


class Attention(nn.Module):
    """Causal self-attention of one layer over the paged KV cache.

    Args:
        num_heads: query heads H of this rank.
        head_dim: D.
        scale: factor on the logits, usually D ** -0.5.
        num_kv_heads: Hkv of this rank, a divisor of H.
        layer_idx: position in the model, for error messages and cache binding.
        sliding_window: each query sees at most this many positions, itself included; None for all.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        num_kv_heads: int,
        *,
        layer_idx: int,
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.layer_idx = layer_idx
        self.sliding_window = sliding_window
        self.backend: AttentionBackend | None = None
        self.kv_cache: KVCache | None = None

    def bind(self, backend: AttentionBackend, kv_cache: KVCache) -> None:
        """Say how and where this layer keeps its keys and values."""
        self.backend, self.kv_cache = backend, kv_cache

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """query [T, H * D], key and value [T, Hkv * D] -> [T, H * D]."""
        num_tokens = query.shape[0]
        out = self.backend.forward(
            query.view(num_tokens, self.num_heads, self.head_dim),
            key.view(num_tokens, self.num_kv_heads, self.head_dim),
            value.view(num_tokens, self.num_kv_heads, self.head_dim),
            self.kv_cache,
            metadata,
            self.scale,
            self.sliding_window,
        )
        return out.reshape(num_tokens, self.num_heads * self.head_dim)

    @property
    def fuses_rotary(self) -> bool:
        """Whether this layer's backend rotates queries and keys itself (`forward_rotary`)."""
        return getattr(self.backend, "fuses_rotary", False)

    def forward_rotary(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """As `forward`, from unrotated qkv [T, (H + 2 * Hkv) * D], which is overwritten -> [T, H * D].

        cos_sin [P, D]: the rotary table; positions int64 [T]: its rows.
        """
        out = self.backend.forward_rotary(
            qkv, cos_sin, positions, self.kv_cache, metadata, self.scale, self.sliding_window
        )
        return out.view(len(qkv), self.num_heads * self.head_dim)
