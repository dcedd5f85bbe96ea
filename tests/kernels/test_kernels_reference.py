"""The references against torch's own attention on contiguous keys: truth must not rest on itself."""

import pytest
import torch
import torch.nn.functional as F

from kernels import reference


def _dense_attention(batch, request: int) -> torch.Tensor:
    """One request with torch's attention and an explicit mask, float64, [query_len, H, D]."""
    start, end = batch.query_start_loc[request : request + 2].tolist()
    keys, values = batch.keys[request].double(), batch.values[request].double()
    query = batch.query[start:end].double()
    own = torch.arange(len(keys) - len(query), len(keys))[:, None]
    position = torch.arange(len(keys))[None, :]
    mask = position <= own
    if batch.sliding_window is not None:
        mask &= position > own - batch.sliding_window
    return F.scaled_dot_product_attention(
        query.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1),
        attn_mask=mask.to(query.device), scale=batch.scale, enable_gqa=True,
    ).transpose(0, 1)  # fmt: skip


@pytest.mark.parametrize("sliding_window", [None, 1, 6])
def test_varlen_reference_is_dense_causal_attention(paged_batch, sliding_window):
    batch = paged_batch([7, 12, 33], [7, 1, 10], num_heads=6, block_size=4, sliding_window=sliding_window)
    expected = torch.cat([_dense_attention(batch, request) for request in range(3)])
    torch.testing.assert_close(batch.varlen(reference, torch.float64), expected)


def test_decode_reference_is_the_last_row_of_dense_attention(paged_batch):
    batch = paged_batch([1, 5, 21], num_heads=6, block_size=4)
    expected = torch.cat([_dense_attention(batch, request) for request in range(3)])
    torch.testing.assert_close(batch.decode(reference, torch.float64), expected)


def test_reference_keeps_the_query_dtype(paged_batch):
    assert paged_batch([5]).decode(reference).dtype == torch.float32
    assert paged_batch([5], dtype=torch.float16).decode(reference).dtype == torch.float16
