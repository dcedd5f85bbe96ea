"""Writes this step's keys and values into the paged cache.

Invariant: exactly the slots named in slot_mapping change; -1 names none. No two rows of one step name
the same slot (the scheduler's promise), so programs need no order.

vLLM: csrc/cache_kernels.cu (`reshape_and_cache_flash`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import next_power_of_2

# Elements one program moves; more heads than fit go to further programs of the same token.
_TILE_ELEMENTS = 2048


@triton.jit
def _reshape_and_cache_kernel(
    key, value, k_cache, v_cache, slot_mapping,
    key_stride_t, key_stride_h, value_stride_t, value_stride_h,
    k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    num_kv_heads,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE

    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < num_kv_heads) & (dims < HEAD_DIM)
    k = tl.load(key + token * key_stride_t + heads * key_stride_h + dims, mask=mask)
    v = tl.load(value + token * value_stride_t + heads * value_stride_h + dims, mask=mask)
    # block is int64: a large cache has more than 2**31 elements.
    tl.store(k_cache + block * k_stride_b + offset * k_stride_t + heads * k_stride_h + dims, k, mask=mask)
    tl.store(v_cache + block * v_stride_b + offset * v_stride_t + heads * v_stride_h + dims, v, mask=mask)


def reshape_and_cache(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write each token's key and value into its cache slot, in place.

    Args and meaning: `kernels.reference.reshape_and_cache`. Rows of key and value may be views into a
    fused qkv tensor; the caches may have any strides but 1 in the last dimension.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    launch.check_caches(k_cache, v_cache)
    num_kv_heads, head_dim = k_cache.shape[2:]
    launch.check_shape("key", key, (None, num_kv_heads, head_dim))
    launch.check_shape("value", value, tuple(key.shape))
    launch.check_tensors({"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache})
    launch.check_index("slot_mapping", slot_mapping, torch.int64, (len(key),), key.device)
    if len(key) == 0:
        return

    block_d = next_power_of_2(head_dim)
    block_h = max(1, min(next_power_of_2(num_kv_heads), _TILE_ELEMENTS // block_d))
    with launch.on_device_of(key):
        _reshape_and_cache_kernel[(len(key), triton.cdiv(num_kv_heads, block_h))](
            key, value, k_cache, v_cache, slot_mapping,
            *key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
            num_kv_heads,
            BLOCK_SIZE=k_cache.shape[1], HEAD_DIM=head_dim, BLOCK_H=block_h, BLOCK_D=block_d,
            num_warps=max(1, min(4, block_h * block_d // 256)),
        )  # fmt: skip
