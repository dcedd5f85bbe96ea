"""What an attention backend is, and which one an engine uses.

A backend decides how the cache is laid out in memory, so it allocates it; everyone else sees the
logical shape `[blocks, block size, KV heads, head size]`.

vLLM: `vllm/v1/attention/backend.py`, `vllm/v1/attention/selector.py`.
"""

from __future__ import annotations

import math
import mmap
from typing import Protocol

import torch

from course_lib.attention.metadata import AttentionMetadata

KVCache = tuple[torch.Tensor, torch.Tensor]  # keys and values, each [NB, BS, Hkv, D]


class AttentionBackend(Protocol):
    """Writes new keys and values into the paged cache, then attends over it."""

    fuses_rotary: bool
    """Whether `forward_rotary` exists: rotation and cache write in one kernel."""

    def allocate_cache(self, num_layers: int, num_blocks: int) -> list[KVCache]:
        """One zeroed (keys, values) pair per layer."""
        ...

    def plan(self, metadata: AttentionMetadata) -> object:
        """Whatever can be prepared once per step instead of once per layer."""
        ...

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
        """query [T, H, D], key and value [T, Hkv, D] -> [T, H, D]; causal, per request."""
        ...


def make_backend(
    name: str, *, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Build the backend called `name` ("torch" or "triton")."""
    if name == "triton":
        from course_lib.attention.triton_paged import TritonPagedBackend as Backend
    else:
        from course_lib.attention.torch_paged import TorchPagedBackend as Backend
    return Backend(block_size, num_kv_heads, head_dim, dtype, device)


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory is only taken when first written to (on a CPU).

    `torch.zeros` writes every byte, so a laptop would pay for its whole cache at start-up; anonymous memory is
    zero until touched. Large pages make the first touch, which every newly used block pays, three times cheaper.
    Raises ValueError if the memory cannot be had.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, size)
    except (OSError, MemoryError, OverflowError, ValueError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"the KV cache needs {size} bytes, which cannot be had here ({error}): lower "
            f"num_gpu_blocks_override or kv_cache_memory_bytes"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return torch.frombuffer(memory, dtype=dtype).view(shape)
