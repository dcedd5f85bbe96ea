"""Paged attention by the Triton kernels: the GPU's backend, and on a CPU the interpreter's.

vLLM: `vllm/v1/attention/backends/triton_attn.py`.
"""

from __future__ import annotations

import torch

from course_lib.attention.backend import KVCache, zeros_on_demand
from course_lib.attention.metadata import AttentionMetadata
from kernels.triton import paged_attention_decode, paged_attention_varlen, reshape_and_cache


class TritonPagedBackend:
    """Built by `make_backend`."""

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache_shape = (block_size, num_kv_heads, head_dim)
        self.dtype = dtype
        self.device = device

    def allocate_cache(self, num_layers: int, num_blocks: int) -> list[KVCache]:
        """One (keys, values) pair per layer, each [NB, BS, Hkv, D], contiguous."""
        storage = zeros_on_demand((num_layers, 2, num_blocks, *self.cache_shape), self.dtype, self.device)
        return [(layer[0], layer[1]) for layer in storage]

    def plan(self, metadata: AttentionMetadata) -> None:
        """Nothing to prepare: the kernels read the metadata as it is."""
        return None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        key_cache, value_cache = kv_cache
        reshape_and_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
        if metadata.max_query_len == 1:
            return paged_attention_decode(
                query, key_cache, value_cache, metadata.block_table, metadata.seq_lens, scale,
                sliding_window=sliding_window, max_seq_len=metadata.max_seq_len,
            )  # fmt: skip
        return paged_attention_varlen(
            query, key_cache, value_cache, metadata.block_table, metadata.seq_lens,
            metadata.query_start_loc, scale, max_query_len=metadata.max_query_len,
            sliding_window=sliding_window,
        )  # fmt: skip
