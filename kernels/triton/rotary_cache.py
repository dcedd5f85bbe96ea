"""Rotary embedding of queries and keys, and the write of keys and values into the paged cache, in one pass.

A program handles all heads of one token: it rotates the queries where they lie, and sends the rotated keys and
the values straight to their slot, so keys never go to memory unrotated. Invariant: exactly the query heads of
`qkv` and the slots named in slot_mapping change; -1 names none.

vLLM: csrc/pos_encoding_kernels.cu (`rotary_embedding`) and csrc/cache_kernels.cu, two kernels there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import next_power_of_2, row_warps


@triton.jit
def _rotary_and_cache_kernel(
    qkv, cos_sin, positions, k_cache, v_cache, slot_mapping,
    qkv_stride, table_stride, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    num_heads, num_kv_heads,
    BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads (queries, then keys, then values) of one token, each as two halves of HALF."""
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    is_query = heads < num_heads
    is_key = (heads >= num_heads) & (heads < num_heads + num_kv_heads)
    is_value = (heads >= num_heads + num_kv_heads) & (heads < num_heads + 2 * num_kv_heads)
    in_half = dims < HALF

    source = qkv + token * qkv_stride + heads * (2 * HALF) + dims
    mask = (heads < num_heads + 2 * num_kv_heads) & in_half
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)

    row = cos_sin + tl.load(positions + token).to(tl.int64) * table_stride + dims
    cos = tl.load(row, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(row + HALF, mask=in_half, other=0.0).to(tl.float32)
    x, y = first.to(tl.float32), second.to(tl.float32)
    rotated_first = (x * cos - y * sin).to(first.dtype)
    rotated_second = (y * cos + x * sin).to(first.dtype)
    tl.store(source, rotated_first, mask=is_query & in_half)
    tl.store(source + HALF, rotated_second, mask=is_query & in_half)

    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        block = slot // BLOCK_SIZE  # int64, as the slots are: a large cache has more than 2**31 elements
        offset = slot % BLOCK_SIZE
        k_row = k_cache + block * k_stride_b + offset * k_stride_t + (heads - num_heads) * k_stride_h + dims
        tl.store(k_row, rotated_first, mask=is_key & in_half)
        tl.store(k_row + HALF, rotated_second, mask=is_key & in_half)
        value_heads = heads - num_heads - num_kv_heads
        v_row = v_cache + block * v_stride_b + offset * v_stride_t + value_heads * v_stride_h + dims
        tl.store(v_row, first, mask=is_value & in_half)
        tl.store(v_row + HALF, second, mask=is_value & in_half)


def rotary_and_cache(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Rotate the queries in place; write rotated keys, and values, into their cache slots.

    Args and meaning: `kernels.reference.rotary_and_cache`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_caches(k_cache, v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    launch.check_shape("qkv", qkv, (None, None))
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    if qkv.shape[1] % head_dim or num_heads < 1 or head_dim % 2:
        raise ValueError(
            f"qkv has {qkv.shape[1]} columns: expected (H + 2 * {num_kv_heads}) * {head_dim}, H >= 1, with an "
            "even head size."
        )
    launch.check_shape("cos_sin", cos_sin, (None, head_dim))
    launch.check_tensors({"k_cache": k_cache, "v_cache": v_cache, "cos_sin": cos_sin})
    launch.check_rows({"qkv": qkv, "k_cache": k_cache[0, 0]})
    for name, index in (("positions", positions), ("slot_mapping", slot_mapping)):
        launch.check_index(name, index, torch.int64, (len(qkv),), qkv.device)
    if len(qkv) == 0:
        return
    total_heads = num_heads + 2 * num_kv_heads
    block_d = next_power_of_2(head_dim // 2)
    block_h = max(1, min(next_power_of_2(total_heads), 2048 // block_d))
    with launch.on_device_of(qkv):
        _rotary_and_cache_kernel[(len(qkv), triton.cdiv(total_heads, block_h))](
            qkv, cos_sin, positions, k_cache, v_cache, slot_mapping,
            qkv.stride(0), cos_sin.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
            num_heads, num_kv_heads,
            BLOCK_SIZE=k_cache.shape[1], HALF=head_dim // 2, BLOCK_H=block_h, BLOCK_D=block_d,
            num_warps=row_warps(block_h * block_d),
        )  # fmt: skip
