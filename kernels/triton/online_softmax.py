"""One step of attention over a tile of paged keys: the inner loop of both attention kernels.

Owns how a token position becomes a cache address and how a tile enters a running softmax. Invariant:
after any number of tiles, `acc / row_sum` is the exact attention over the keys seen so far, with scores
taken relative to `row_max`; slots outside [kv_start, kv_end) are never read, so they may hold anything.

vLLM: vllm/v1/attention/ops/triton_unified_attention.py (the loop body).
"""

import triton
import triton.language as tl


@triton.jit
def attend_tile(
    acc, row_max, row_sum, q, q_pos, tile_start, kv_start, kv_end, table_row, k_head, v_head,
    k_stride_b, k_stride_t, v_stride_b, v_stride_t, qk_scale,
    WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Attend q to the keys at positions tile_start .. tile_start + BLOCK_N - 1.

    Args:
        acc: float32 [M, BLOCK_D]; row_max, row_sum: float32 [M]. The running state, returned updated.
        q: [M, BLOCK_D], zero beyond HEAD_DIM.
        q_pos: int32 [M], positions; -1 marks a padding row, which attends to nothing.
        tile_start: a multiple of BLOCK_N; the tile holds at least one position in [kv_start, kv_end).
        table_row: pointer to the request's row of the block table.
        k_head, v_head: pointers to this KV head in block 0.
        qk_scale: scale * log2(e), because exp2 is the hardware's exponential.
        WINDOW: sliding window in tokens, 0 for none.
        FULL: every query row sees every key of the tile, so nothing is compared (padding rows may gather
            anything then; they are never stored). Most tiles of a long sequence are of this kind.
    """
    lane = tl.arange(0, BLOCK_N)
    k_pos = tile_start + lane
    if FULL:
        in_range = lane >= 0
    else:
        in_range = (k_pos >= kv_start) & (k_pos < kv_end)
    if BLOCK_SIZE >= BLOCK_N:
        # Both are powers of two and the tile is aligned, so it lies in one block: one look-up.
        block = tl.load(table_row + tile_start // BLOCK_SIZE).to(tl.int64)
    elif FULL:
        block = tl.load(table_row + k_pos // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(table_row + k_pos // BLOCK_SIZE, mask=in_range, other=0).to(tl.int64)
    offset = k_pos % BLOCK_SIZE

    dims = tl.arange(0, BLOCK_D)
    mask = in_range[:, None] & (dims < HEAD_DIM)[None, :]
    k_rows = block * k_stride_b + offset * k_stride_t
    if FULL and HEAD_DIM == BLOCK_D:
        k = tl.load(k_head + k_rows[:, None] + dims[None, :])
    else:
        k = tl.load(k_head + k_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    if not FULL:
        visible = in_range[None, :] & (k_pos[None, :] <= q_pos[:, None])
        if WINDOW > 0:
            visible = visible & (k_pos[None, :] > q_pos[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    if FULL:
        base = new_max
    else:
        # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - base[:, None])
    correction = tl.exp2(row_max - base)

    # Masked V must be 0, not merely weighted 0: an unwritten slot may hold NaN.
    v_rows = block * v_stride_b + offset * v_stride_t
    if FULL and HEAD_DIM == BLOCK_D:
        v = tl.load(v_head + v_rows[:, None] + dims[None, :])
    else:
        v = tl.load(v_head + v_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    return acc, new_max, row_sum
