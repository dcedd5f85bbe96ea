"""How large a kernel's tiles are and into how many parts decode splits a sequence.

Owns every number that decides speed and none that decides the result. Chosen from shapes the host
knows, never by autotuning: a choice must be the same under the interpreter, while a CUDA graph is
captured, and when it is replayed.
"""

import functools
from typing import NamedTuple

import torch

# tl.dot takes tiles of at least 16 in every dimension.
MIN_DOT = 16
# Splits beyond this cost more in the reduction than they gain in parallel loads.
MAX_SPLITS = 64
# A split shorter than this many tokens does not pay for its partial result.
MIN_TOKENS_PER_SPLIT = 128
# Columns that one program of an elementwise kernel handles.
ELEMENTWISE_BLOCK = 1024
# Thread blocks per multiprocessor that decode aims for, so that loads of one hide latency of others. On an H100,
# 32 requests of 4,096 tokens reached 1.8 TB/s with two and 2.4 with six.
WAVES = 6


class AttentionTile(NamedTuple):
    """Tile sizes of one launch: rows of queries x heads, keys, padded head size; and compiler hints."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


class ExpertTile(NamedTuple):
    """Tile sizes of the products with experts' weights: assignments, output features, input features."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def row_warps(elements: int) -> int:
    """Warps for a program that holds `elements` values: eight to a thread, so that loads are 16 bytes wide."""
    return max(1, min(8, elements // 256))


def attention_tile(rows: int, queries_per_kv: int, head_dim: int, dtype: torch.dtype) -> AttentionTile:
    """Tile for programs that have up to `rows` query rows (queries x heads of one KV head) to share.

    The bounds keep query, K, V and accumulator tiles within shared memory and registers of an 80 GB
    class GPU: float32 and head sizes over 128 halve the tile.
    """
    wide = head_dim > 128
    full_precision = dtype == torch.float32
    most_rows = 32 if full_precision else 64
    block_m = min(next_power_of_2(rows), most_rows)
    return AttentionTile(
        block_m=max(block_m, next_power_of_2(queries_per_kv), MIN_DOT),
        block_n=32 if wide or full_precision else 64,
        block_d=max(next_power_of_2(head_dim), MIN_DOT),
        num_warps=4,
        # Measured on an H100: a third tile in flight is worth 5 % of a prompt's attention; it must fit in.
        num_stages=2 if wide or full_precision or block_m < 64 else 3,
    )


def expert_tile(assignments: int, num_experts: int, dtype: torch.dtype) -> ExpertTile:
    """Tile for `assignments` of tokens to `num_experts` experts, shared out about evenly.

    Few per expert: small tiles, since rows that fill a tile up are wasted work, and reading weights is what counts.
    On an H100 weights were then read at 2.4 TB/s (8 tokens), and 4,096 tokens computed at 434 TFLOP/s.
    """
    each = assignments / num_experts
    if dtype == torch.float32:
        return ExpertTile(16 if each <= 16 else 32, 32, 32, 4, 2)
    if each <= 16:
        return ExpertTile(16, 64, 128, 4, 4)
    if each <= 64:
        return ExpertTile(32, 64, 128, 4, 3)
    if each <= 256:
        return ExpertTile(64, 128, 64, 4, 3)
    return ExpertTile(128, 128, 64, 8, 3)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, where the interpreter runs one program after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_num_splits(batch: int, num_kv_heads: int, max_seq_len: int, device: torch.device) -> int:
    """Parts into which decode cuts each sequence so that a small batch still fills the device.

    Args:
        max_seq_len: an upper bound in tokens, known to the host.

    Returns:
        A power of two (few compiled variants, few captured graphs) in 1 .. MAX_SPLITS.
    """
    programs = batch * num_kv_heads
    wanted = WAVES * _multiprocessors(device) // programs
    useful = max_seq_len // MIN_TOKENS_PER_SPLIT
    splits = max(1, min(wanted, useful, MAX_SPLITS))
    return 1 << (splits.bit_length() - 1)
