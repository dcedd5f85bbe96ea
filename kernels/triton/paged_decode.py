"""Decode attention over the paged cache: one query token per request, sequences split among programs.

A program handles one request, one KV head and one part of the sequence, with all query heads of that KV
head as the rows of its tile, so each key and value is read from memory once. With more than one part
(flash-decoding), each leaves its own softmax result and log-sum-exp, and a second kernel merges them.
Invariant: the merge is exact, so the result does not depend on the number of parts but for rounding.

vLLM: vllm/v1/attention/ops/triton_unified_attention.py (the 3D kernel), triton_decode_attention.py.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.online_softmax import attend_tile
from kernels.triton.tiles import MAX_SPLITS, attention_tile, choose_num_splits, next_power_of_2


@triton.jit
def _decode_kernel(
    query, k_cache, v_cache, block_table, seq_lens, out, partial_out, partial_lse,
    q_stride_b, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    table_stride, out_stride_b, out_stride_h, qk_scale, num_splits,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one request x one KV head (GROUP query heads) x one part of the sequence."""
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    seq_len = tl.load(seq_lens + request)
    kv_start = tl.maximum(seq_len - WINDOW, 0) if WINDOW > 0 else 0

    # Each request divides its own tiles, so a short one in a long batch is split as finely.
    first_tile = kv_start // BLOCK_N
    tiles_per_split = tl.cdiv(tl.cdiv(seq_len, BLOCK_N) - first_tile, num_splits)
    split_start = (first_tile + split * tiles_per_split) * BLOCK_N
    split_end = tl.minimum(split_start + tiles_per_split * BLOCK_N, seq_len)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offset = request * q_stride_b + heads[:, None] * q_stride_h + dims[None, :]
    q = tl.load(query + q_offset, mask=mask, other=0.0)
    q_pos = tl.where(rows < GROUP, seq_len - 1, -1)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    table_row = block_table + request * table_stride
    # Without a window all tiles but the last are seen whole.
    full_end = split_start
    if WINDOW == 0:
        full_end = tl.maximum(tl.minimum(split_end, seq_len // BLOCK_N * BLOCK_N), split_start)
        for tile_start in range(split_start, full_end, BLOCK_N):
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q, q_pos, tile_start, kv_start, seq_len, table_row,
                k_cache + kv_head * k_stride_h, v_cache + kv_head * v_stride_h,
                k_stride_b, k_stride_t, v_stride_b, v_stride_t, qk_scale,
                WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
    for tile_start in range(full_end, split_end, BLOCK_N):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, q_pos, tile_start, kv_start, seq_len, table_row,
            k_cache + kv_head * k_stride_h, v_cache + kv_head * v_stride_h,
            k_stride_b, k_stride_t, v_stride_b, v_stride_t, qk_scale,
            WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip

    # No key seen (an empty request or part): the result is 0, and weighs nothing in the merge.
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    result = acc / divisor[:, None]
    if SPLIT:
        row = (request * tl.num_programs(1) * GROUP + heads) * num_splits + split
        tl.store(partial_out + row[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
        # row_max is -inf without keys, and stays so.
        tl.store(partial_lse + row, row_max + tl.log2(divisor), mask=rows < GROUP)
    else:
        out_offset = request * out_stride_b + heads[:, None] * out_stride_h + dims[None, :]
        tl.store(out + out_offset, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _merge_splits_kernel(
    partial_out, partial_lse, out, out_stride_b, out_stride_h, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one request x one query head; weights each part by its share of the softmax sum."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    splits = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_D)
    row = (request * tl.num_programs(1) + head) * num_splits

    lse = tl.load(partial_lse + row + splits, mask=splits < num_splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    mask = (splits < num_splits)[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial_out + (row + splits)[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    merged = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    out_offset = request * out_stride_b + head * out_stride_h + dims
    tl.store(out + out_offset, merged.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


def paged_attention_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None = None,
    num_splits: int | None = None,
    max_seq_len: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per request, the last token of its sequence.

    Args and meaning: `kernels.reference.paged_attention_decode`, and:
        num_splits: parts each sequence is cut into, 1 to 64; None chooses from batch, KV heads,
            `max_seq_len` and the device's multiprocessors.
        max_seq_len: an upper bound of seq_lens in tokens, so that it need not be read from the device;
            None takes what the block table can hold.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_attention(query, k_cache, v_cache, block_table, seq_lens, sliding_window, out)
    batch, num_heads, head_dim = query.shape
    launch.check_shape("seq_lens", seq_lens, (batch,))
    block_size, num_kv_heads = k_cache.shape[1:3]
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits is {num_splits}: it must be 1 to {MAX_SPLITS}, or None to choose.")
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if batch == 0:
        return out
    if num_splits is None:
        longest = block_table.shape[1] * block_size if max_seq_len is None else max_seq_len
        if sliding_window is not None:
            longest = min(longest, sliding_window)
        num_splits = choose_num_splits(batch, num_kv_heads, longest, query.device)

    if num_splits == 1:
        partial_out = partial_lse = out  # not touched
    else:
        partial_out = torch.empty((batch, num_heads, num_splits, head_dim), dtype=torch.float32,
                                  device=query.device)  # fmt: skip
        partial_lse = torch.empty((batch, num_heads, num_splits), dtype=torch.float32, device=query.device)

    group = num_heads // num_kv_heads
    tile = attention_tile(group, group, head_dim, query.dtype)
    with launch.on_device_of(query):
        _decode_kernel[(batch, num_kv_heads, num_splits)](
            query, k_cache, v_cache, block_table, seq_lens, out, partial_out, partial_lse,
            *query.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            block_table.stride(0), *out.stride()[:2], scale * math.log2(math.e), num_splits,
            SPLIT=num_splits > 1, WINDOW=sliding_window or 0, BLOCK_SIZE=block_size, HEAD_DIM=head_dim,
            GROUP=group, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if num_splits > 1:
            _merge_splits_kernel[(batch, num_heads)](
                partial_out, partial_lse, out, *out.stride()[:2], num_splits,
                HEAD_DIM=head_dim, BLOCK_S=next_power_of_2(num_splits), BLOCK_D=tile.block_d,
            )  # fmt: skip
    return out
