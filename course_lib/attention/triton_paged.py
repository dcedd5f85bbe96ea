"""Paged attention by the Triton kernels: the GPU's backend, and on a CPU the interpreter's.

vLLM: `vllm/v1/attention/backends/triton_attn.py`.
"""

from __future__ import annotations

import torch

from course_lib.attention.backend import KVCache, zeros_on_demand
from course_lib.attention.metadata import AttentionMetadata
from kernels.triton import paged_attention_decode, paged_attention_varlen, reshape_and_cache, rotary_and_cache


class TritonPagedBackend:
    """Built by `make_backend`. Without host state: everything it launches can be captured in a CUDA graph."""

    fuses_rotary = True

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache_shape = (block_size, num_kv_heads, head_dim)
        self.dtype = dtype
        self.device = device

    def allocate_cache(self, num_layers: int, num_blocks: int) -> list[KVCache]:
        """One (keys, values) pair per layer, each [NB, BS, Hkv, D], stored heads first.

        A program reads one KV head: a block's keys of that head then lie in one piece.
        """
        block_size, num_kv_heads, head_dim = self.cache_shape
        shape = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
        storage = zeros_on_demand(shape, self.dtype, self.device)
        return [(layer[0].transpose(1, 2), layer[1].transpose(1, 2)) for layer in storage]

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
        reshape_and_cache(key, value, *kv_cache, metadata.slot_mapping)
        return self._attend(query, kv_cache, metadata, scale, sliding_window)

    def forward_rotary(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """As `forward`, from unrotated qkv [T, (H + 2 * Hkv) * D] and the rotary table's rows `positions`."""
        rotary_and_cache(qkv, cos_sin, positions, *kv_cache, metadata.slot_mapping)
        _, num_kv_heads, head_dim = self.cache_shape
        query = qkv.view(len(qkv), -1, head_dim)[:, : -2 * num_kv_heads]
        return self._attend(query, kv_cache, metadata, scale, sliding_window)

    @staticmethod
    def _attend(
        query: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        if metadata.max_query_len == 1:
            return paged_attention_decode(
                query, *kv_cache, metadata.block_table, metadata.seq_lens, scale,
                sliding_window=sliding_window, max_seq_len=metadata.max_seq_len,
            )  # fmt: skip
        return paged_attention_varlen(
            query, *kv_cache, metadata.block_table, metadata.seq_lens, metadata.query_start_loc, scale,
            max_query_len=metadata.max_query_len, sliding_window=sliding_window,
        )  # fmt: skip
