"""reshape_and_cache: exactly the named slots change, in every layout the engine's backends use."""

import pytest
import torch

from kernels import reference

CASES = [  # block_size, num_kv_heads, head_dim, layout
    (1, 1, 16, "offsets_first"),
    (4, 3, 80, "heads_first"),
    (16, 3, 64, "offsets_first"),
    (16, 2, 64, "fused"),
    (32, 20, 128, "offsets_first"),  # more heads than one program holds
    (256, 3, 96, "heads_first"),
]


def _empty_caches(layout, block_size, num_kv_heads, head_dim, dtype, device):
    """Two zeroed caches of 5 blocks with the strides of a layout, each in a storage of its own."""

    def zeros(*shape):
        return torch.zeros(shape, dtype=dtype, device=device)

    if layout == "heads_first":
        return [zeros(5, num_kv_heads, block_size, head_dim).transpose(1, 2) for _ in range(2)]
    k_cache, v_cache = (zeros(5, block_size, num_kv_heads, head_dim) for _ in range(2))
    if layout == "fused":  # K with room for V behind it in every block, and V elsewhere: unequal strides
        k_cache = zeros(5, 2, block_size, num_kv_heads, head_dim + 8)[:, 0, ..., :head_dim]
    return [k_cache, v_cache]


def _inputs(num_tokens, num_kv_heads, head_dim, block_size, dtype, device):
    """Key and value as views into a fused and padded qkv tensor; distinct slots, some rows padding."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(num_tokens, 4 + 2 * num_kv_heads, head_dim + 8, generator=generator)
    qkv = qkv.to(device, dtype)[..., :head_dim]
    num_slots = 5 * block_size
    slots = torch.randperm(num_slots, generator=generator)[:num_tokens]
    slots = torch.cat([slots, slots.new_full((num_tokens - len(slots),), -1)])
    slots[1::3] = -1
    return *qkv[:, 4:].chunk(2, dim=1), slots.to(device)


@pytest.mark.parametrize(("block_size", "num_kv_heads", "head_dim", "layout"), CASES)
def test_writes_the_named_slots_and_no_other(
    triton_kernels, device, dtype, block_size, num_kv_heads, head_dim, layout
):
    key, value, slots = _inputs(11, num_kv_heads, head_dim, block_size, dtype, device)
    actual = _empty_caches(layout, block_size, num_kv_heads, head_dim, dtype, device)
    expected = _empty_caches(layout, block_size, num_kv_heads, head_dim, dtype, device)
    triton_kernels.reshape_and_cache(key, value, *actual, slots)
    reference.reshape_and_cache(key, value, *expected, slots)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
        written = wanted.flatten(2).ne(0).any(-1).sum().item()
        assert written == (slots >= 0).sum().item()
        # The gaps behind the heads of a padded layout are not the kernel's to write.
        whole = torch.empty(0, dtype=dtype, device=device).set_(got.untyped_storage())
        assert whole.ne(0).sum() == got.ne(0).sum()


def test_no_tokens_and_only_padding_change_nothing(triton_kernels, device):
    caches = torch.zeros(2, 3, 4, 2, 16, device=device).unbind()
    key = torch.ones(2, 2, 16, device=device)
    padding = torch.full((2,), -1, dtype=torch.int64, device=device)
    triton_kernels.reshape_and_cache(key, key, *caches, padding)
    triton_kernels.reshape_and_cache(key[:0], key[:0], *caches, padding[:0])
    assert not any(cache.any() for cache in caches)


def test_round_trip_through_the_cache_gives_dense_attention(triton_kernels, device, assert_matches):
    """Tokens written by one kernel are what the other attends to: both agree on what a slot is."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 10, 2, 16, generator=generator).to(device)
    k_cache, v_cache = torch.full((2, 6, 4, 2, 16), float("nan"), device=device)
    block_table = torch.tensor([[4, 1, 5]], dtype=torch.int32, device=device)
    positions = torch.arange(10, device=device)
    slots = block_table[0, positions // 4].long() * 4 + positions % 4
    triton_kernels.reshape_and_cache(k, v, k_cache, v_cache, slots)
    actual = triton_kernels.paged_attention_varlen(
        q, k_cache, v_cache, block_table, torch.tensor([10], dtype=torch.int32, device=device),
        torch.tensor([0, 10], dtype=torch.int32, device=device), 0.25, max_query_len=10,
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.25
    )
    assert_matches(actual, expected.transpose(0, 1))
