"""The torch backend's decode in 16 bits: two ways by size, both near float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from course_lib.attention.backend import make_backend
from course_lib.attention.metadata import AttentionMetadata


@pytest.mark.parametrize("lengths", [(5, 17, 33), (600, 500)], ids=["few positions", "many"])
@pytest.mark.parametrize("window", [None, 6])
def test_paged_decode_in_bfloat16_is_near_float64(lengths: tuple[int, ...], window: int | None) -> None:
    """Both ways that the torch backend has for 16-bit decode groups."""
    torch.manual_seed(0)
    size, heads, kv_heads, dim = 4, 6, 2, 16
    backend = make_backend(
        "torch", block_size=size, num_kv_heads=kv_heads, head_dim=dim, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    blocks = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, (count, start) in enumerate(zip(blocks, np.cumsum([0, *blocks]).tolist(), strict=False)):
        table[row, :count] = order[start : start + count]
    (cache,) = backend.allocate_cache(1, sum(blocks))
    for tensor in cache:
        tensor.normal_()
    last = torch.tensor(lengths) - 1
    slots = table[torch.arange(len(lengths)), last // size].long() * size + last % size
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(len(lengths) + 1).int(), seq_lens=torch.tensor(lengths).int(),
        block_table=table, slot_mapping=slots, query_start_loc_host=np.arange(len(lengths) + 1),
        seq_lens_host=np.array(lengths), max_query_len=1, max_seq_len=max(lengths),
    )  # fmt: skip
    metadata.plan = backend.plan(metadata)
    query = torch.randn(len(lengths), heads, dim).bfloat16()
    key, value = (torch.randn(len(lengths), kv_heads, dim).bfloat16() for _ in range(2))
    found = backend.forward(query, key, value, cache, metadata, 0.25, window)
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        keys, values = (t[table[row].long()].flatten(0, 1)[first:length].double() for t in cache)
        keys, values = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
        weights = torch.einsum("hd,lhd->hl", query[row].double(), keys).mul(0.25).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", weights, values)
        torch.testing.assert_close(found[row].double(), expected, atol=2e-2, rtol=2e-2)
