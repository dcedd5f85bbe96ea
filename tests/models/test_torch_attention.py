"""The CPU backend's decode: every way that it has, near float64; and which requests plain torch computes together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from course_lib.attention.backend import make_backend
from course_lib.attention.metadata import AttentionMetadata
from course_lib.attention import torch_paged
from course_lib.attention.torch_paged import TorchPagedBackend
from kernels.cpu import compiled_kernels


SIZE, HEADS, KV_HEADS, DIM = 4, 6, 2, 16


def tables(lengths: tuple[int, ...], common: tuple[int, ...]) -> torch.Tensor:
    """int32 [R, M] of scattered blocks; the rows in `common` share their first blocks, as many as its last entry."""
    blocks = [-(-length // SIZE) for length in lengths]
    order = torch.randperm(sum(blocks)).int()
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, (count, start) in enumerate(zip(blocks, np.cumsum([0, *blocks]).tolist(), strict=False)):
        table[row, :count] = order[start : start + count]
    if common:
        *rows, shared = common
        table[rows, :shared] = table[rows[0], :shared].clone()
    return table


def one_token_each(table: torch.Tensor, lengths: tuple[int, ...]) -> AttentionMetadata:
    last = torch.tensor(lengths) - 1
    slots = table[torch.arange(len(lengths)), last // SIZE].long() * SIZE + last % SIZE
    return AttentionMetadata(
        query_start_loc=torch.arange(len(lengths) + 1).int(), seq_lens=torch.tensor(lengths).int(),
        block_table=table, slot_mapping=slots, query_start_loc_host=np.arange(len(lengths) + 1),
        seq_lens_host=np.array(lengths), max_query_len=1, max_seq_len=max(lengths),
    )  # fmt: skip


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on machines without a compiler."""
    monkeypatch.setattr(torch_paged, "compiled_kernels", lambda: None)


def make(dtype: torch.dtype) -> TorchPagedBackend:
    return make_backend(
        "torch", block_size=SIZE, num_kv_heads=KV_HEADS, head_dim=DIM, dtype=dtype, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("lengths", "common"),
    [
        ((5, 17, 33), ()),
        ((600, 500), ()),
        ((2600, 2500, 9, 2600), (0, 1, 3, 620)),
        ((1201, 1204, 1300), (0, 1, 2, 300)),  # of one request, nothing but the newest token is its own
    ],
    ids=["few positions", "many", "some with a common prefix", "all with one"],
)
@pytest.mark.parametrize("window", [None, 6, 1150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["compiled", "plain_torch"])
def test_paged_decode_is_near_float64(
    lengths: tuple[int, ...],
    common: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    way: str,
    request: pytest.FixtureRequest,
) -> None:
    if way == "plain_torch":
        request.getfixturevalue("plain_torch")
    elif compiled_kernels() is None:
        pytest.skip("no compiled kernels here")
    torch.manual_seed(0)
    backend = make(dtype)
    table = tables(lengths, common)
    (cache,) = backend.allocate_cache(1, int(table.max()) + 1)
    for tensor in cache:
        tensor.normal_()
    metadata = one_token_each(table, lengths)
    metadata.plan = backend.plan(metadata)
    if way == "plain_torch":
        assert any(group.gather.prefix_len for group in metadata.plan.decode) == bool(common)
    query = torch.randn(len(lengths), HEADS, DIM).to(dtype)
    key, value = (torch.randn(len(lengths), KV_HEADS, DIM).to(dtype) for _ in range(2))
    found = backend.forward(query, key, value, cache, metadata, 0.25, window)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        keys, values = (t[table[row].long()].flatten(0, 1)[first:length].double() for t in cache)
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (keys, values))
        weights = torch.einsum("hd,lhd->hl", query[row].double(), keys).mul(0.25).softmax(-1)
        expected = torch.einsum("hl,lhd->hd", weights, values)
        torch.testing.assert_close(found[row].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("plain_torch")
def test_requests_with_a_common_prefix_are_computed_together() -> None:
    """Two families in one batch, a member of one family that left it early, and a stranger."""
    lengths = (4000, 4010, 4001, 4003, 4001, 4020, 2000)
    table = tables(lengths, ())
    table[[0, 2, 4], :900] = table[0, :900].clone()
    table[[1, 3], :990] = table[1, :990].clone()
    table[5, :3] = table[0, :3]
    plan = make(torch.float32).plan(one_token_each(table, lengths))
    found = {}
    for group in plan.decode:
        rows = range(len(lengths)) if isinstance(group.token_rows, slice) else group.token_rows.tolist()
        found.setdefault(group.gather.prefix_len // SIZE, []).extend(rows)
    assert {prefix: sorted(rows) for prefix, rows in found.items()} == {900: [0, 2, 4], 990: [1, 3], 0: [5, 6]}


@pytest.mark.usefixtures("plain_torch")
def test_the_block_of_the_newest_token_is_in_no_prefix() -> None:
    """Even if a table says so: samples of one prompt have it in common until one of them writes there."""
    lengths = (2400, 2400, 2400)
    plan = make(torch.float32).plan(one_token_each(tables(lengths, (0, 1, 2, 600)), lengths))
    assert [group.gather.prefix_len for group in plan.decode] == [599 * SIZE]
