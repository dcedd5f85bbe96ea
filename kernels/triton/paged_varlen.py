"""Causal attention of a ragged batch over the paged cache: prompts, prompt chunks and single tokens.

A program handles up to BLOCK_Q consecutive queries of one request, with all query heads of one KV head
(BLOCK_Q x GROUP rows), so each key and value it reads serves them all. The grid is flat over blocks of
queries: no program is launched for the difference between a long prompt and a short one beside it.
Invariant: every query row belongs to exactly one program.

vLLM: vllm/v1/attention/ops/triton_unified_attention.py (the 2D kernel).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.online_softmax import attend_tile
from kernels.triton.tiles import attention_tile


@triton.jit
def _find_request(query_start_loc, query_block, num_requests, BLOCK_Q: tl.constexpr):
    """Index of the request that owns this block of queries, by bisection.

    Request i's blocks begin at number query_start_loc[i] // BLOCK_Q + i: the quotient never counts more
    blocks than came before, and the + i leaves each earlier request room for a last, partial one. The
    host can size the grid by the same formula without knowing any length.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // BLOCK_Q + middle <= query_block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _varlen_kernel(
    query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out,
    q_stride_t, q_stride_h, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    table_stride, out_stride_t, out_stride_h, qk_scale, num_requests,
    WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_Q queries of one request x one KV head (GROUP query heads)."""
    query_block = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    request = _find_request(query_start_loc, query_block, num_requests, BLOCK_Q)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    first_query = (query_block - (query_start // BLOCK_Q + request)) * BLOCK_Q
    if first_query >= query_len:
        return
    seq_len = tl.load(seq_lens + request)
    context_len = seq_len - query_len

    # Row r of the tile is query r // GROUP, head r % GROUP; with a GROUP of 3, one row of 64 is spare.
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    queries = first_query + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_valid = (rows < BLOCK_Q * GROUP) & (queries < query_len)
    mask = row_valid[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (query_start + queries).to(tl.int64)
    q_offset = tokens[:, None] * q_stride_t + heads[:, None] * q_stride_h + dims[None, :]
    q = tl.load(query + q_offset, mask=mask, other=0.0)
    q_pos = tl.where(row_valid, context_len + queries, -1)

    # Keys that any query of this block sees: from the first one's window to the last one's own position.
    last_query = tl.minimum(first_query + BLOCK_Q, query_len) - 1
    kv_end = context_len + last_query + 1
    kv_start = tl.maximum(context_len + first_query - WINDOW + 1, 0) if WINDOW > 0 else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    table_row = block_table + request.to(tl.int64) * table_stride
    # Tiles that end before the first query's own position are seen whole by every query.
    full_end = kv_start // BLOCK_N * BLOCK_N
    if WINDOW == 0:
        full_end = (context_len + first_query + 1) // BLOCK_N * BLOCK_N
        for tile_start in range(0, full_end, BLOCK_N):
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q, q_pos, tile_start, kv_start, kv_end, table_row,
                k_cache + kv_head * k_stride_h, v_cache + kv_head * v_stride_h,
                k_stride_b, k_stride_t, v_stride_b, v_stride_t, qk_scale,
                WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, True,
            )  # fmt: skip
    for tile_start in range(full_end, kv_end, BLOCK_N):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, q_pos, tile_start, kv_start, kv_end, table_row,
            k_cache + kv_head * k_stride_h, v_cache + kv_head * v_stride_h,
            k_stride_b, k_stride_t, v_stride_b, v_stride_t, qk_scale,
            WINDOW, BLOCK_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip

    result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_offset = tokens[:, None] * out_stride_t + heads[:, None] * out_stride_h + dims[None, :]
    tl.store(out + out_offset, result.to(out.dtype.element_ty), mask=mask)


def paged_attention_varlen(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    max_query_len: int,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch: each request brings any number of its newest tokens.

    Args and meaning: `kernels.reference.paged_attention_varlen`. max_query_len only sizes the tiles; a
    wrong one costs speed.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_attention(query, k_cache, v_cache, block_table, seq_lens, sliding_window, out)
    num_requests = len(seq_lens)
    launch.check_index("query_start_loc", query_start_loc, torch.int32, (num_requests + 1,), query.device)
    if max_query_len < 1:
        raise ValueError(f"max_query_len is {max_query_len}: it must be at least 1.")
    if out is None:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0 or num_requests == 0:
        return out

    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    tile = attention_tile(max_query_len * group, group, head_dim, query.dtype)
    block_q = tile.block_m // group
    with launch.on_device_of(query):
        _varlen_kernel[(num_tokens // block_q + num_requests, num_kv_heads)](
            query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out,
            *query.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            block_table.stride(0), *out.stride()[:2], scale * math.log2(math.e), num_requests,
            WINDOW=sliding_window or 0, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, GROUP=group,
            BLOCK_Q=block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out
