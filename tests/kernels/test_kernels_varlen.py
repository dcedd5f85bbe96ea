"""paged_attention_varlen against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference

# Whole prompts, a chunk behind a context, decodes, an empty request, a padding request with a length.
SEQ_LENS = [37, 100, 1, 0, 70, 33]
QUERY_LENS = [37, 9, 1, 0, 1, 0]

# num_heads, num_kv_heads, head_dim, block_size, layout, sliding_window
CASES = [
    (1, 1, 16, 16, "offsets_first", None),
    (9, 3, 64, 16, "offsets_first", None),  # SmolLM2-135M
    (9, 3, 64, 16, "heads_first", 20),
    (4, 1, 80, 4, "fused", None),
    (8, 1, 64, 32, "offsets_first", None),
    (24, 1, 16, 16, "heads_first", None),
    (3, 3, 16, 1, "offsets_first", None),
    (4, 2, 96, 256, "heads_first", None),
    (2, 1, 256, 256, "fused", None),
    (4, 2, 16, 64, "offsets_first", 1),
    (6, 2, 16, 8, "offsets_first", 33),
    (6, 2, 64, 256, "fused", 5),
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "layout", "sliding_window"), CASES
)
def test_varlen_matches_reference(
    triton_kernels, paged_batch, assert_matches, dtype,
    num_heads, num_kv_heads, head_dim, block_size, layout, sliding_window,
):  # fmt: skip
    batch = paged_batch(
        SEQ_LENS, QUERY_LENS, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        block_size=block_size, layout=layout, sliding_window=sliding_window, dtype=dtype,
    )  # fmt: skip
    actual = batch.varlen(triton_kernels)
    assert actual.dtype == dtype
    assert_matches(actual, batch.varlen(reference, torch.float64))


def test_empty_requests_anywhere_in_the_batch(triton_kernels, paged_batch, assert_matches):
    """The search for a program's request must step over requests without queries."""
    batch = paged_batch([0, 0, 5, 9, 0, 40, 0], [0, 0, 5, 0, 0, 3, 0], block_size=4)
    assert_matches(batch.varlen(triton_kernels), batch.varlen(reference, torch.float64))


def test_many_short_requests_and_one_long(triton_kernels, paged_batch, assert_matches):
    """Blocks of queries are numbered across requests of every length; none may be lost or doubled."""
    query_lens = [1, 2, 15, 16, 17, 1, 31, 33, 1]
    batch = paged_batch([n + 3 for n in query_lens], query_lens, num_heads=1, num_kv_heads=1, block_size=8)
    for max_query_len in (33, 16, 1):  # only the tile size hangs on it
        actual = batch.varlen(triton_kernels, max_query_len=max_query_len)
        assert_matches(actual, batch.varlen(reference, torch.float64))


def test_decode_batch_equals_the_decode_kernel(triton_kernels, paged_batch, assert_matches):
    batch = paged_batch([1, 50, 77], num_heads=6)
    assert_matches(batch.varlen(triton_kernels), batch.decode(triton_kernels, num_splits=2))


def test_chunked_prefill_equals_whole_prefill(triton_kernels, paged_batch, device, assert_matches):
    """The last 7 of 40 tokens as a chunk give the same rows as the whole prompt at once."""
    whole = paged_batch([40], [40])
    chunk = whole.query[33:]
    actual = triton_kernels.paged_attention_varlen(
        chunk, whole.k_cache, whole.v_cache, whole.block_table, whole.seq_lens,
        torch.tensor([0, 7], dtype=torch.int32, device=device), whole.scale, max_query_len=7,
    )  # fmt: skip
    assert_matches(actual, whole.varlen(triton_kernels)[33:])


def test_rows_of_no_request_are_left_alone(triton_kernels, paged_batch, device):
    """Padding rows behind the last request (a captured graph's batch is padded)."""
    batch = paged_batch([12, 30], [4, 2])
    padded = torch.cat([batch.query, torch.full((3, 4, 16), float("nan"), device=device)])
    expected = batch.varlen(reference)
    batch.query = padded
    for kernels in (triton_kernels, reference):
        whole = torch.full((9, 6, 20), 7.0, device=device)
        out = whole[:, 1:5, :16]
        assert batch.varlen(kernels, out=out) is out
        torch.testing.assert_close(out[:6], expected, rtol=1e-5, atol=1e-5)
        assert whole.eq(7).sum() == whole.numel() - out[:6].numel()
        assert batch.varlen(kernels)[6:].eq(0).all()


def test_a_query_without_keys_gives_zero(triton_kernels, paged_batch, device):
    """A padding request may bring a query row and a length of 0."""
    batch = paged_batch([8, 6], [1, 1])
    batch.seq_lens[1] = 0
    for kernels in (triton_kernels, reference):
        assert batch.varlen(kernels)[1].eq(0).all()
        assert batch.varlen(kernels)[0].ne(0).all()


def test_large_scores_do_not_overflow(triton_kernels, paged_batch):
    batch = paged_batch([90], [20], num_heads=2, num_kv_heads=1)
    batch.scale = 60.0
    actual, expected = batch.varlen(triton_kernels).double(), batch.varlen(reference, torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_empty_batch(triton_kernels, paged_batch):
    assert paged_batch([], []).varlen(triton_kernels).shape == (0, 4, 16)
    assert paged_batch([5, 0], [0, 0]).varlen(triton_kernels).shape == (0, 4, 16)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_varlen_property(triton_kernels, paged_batch, assert_matches, data):
    _check_random_varlen(triton_kernels, paged_batch, assert_matches, data, longest=80)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_varlen_property_sweep(triton_kernels, paged_batch, assert_matches, data):
    _check_random_varlen(triton_kernels, paged_batch, assert_matches, data, longest=150)


def _check_random_varlen(kernels, paged_batch, assert_matches, data, longest):
    num_kv_heads = data.draw(st.integers(1, 3), label="num_kv_heads")
    lengths = st.integers(0, longest).flatmap(
        lambda seq_len: st.tuples(st.just(seq_len), st.integers(0, seq_len))
    )
    requests = data.draw(st.lists(lengths, min_size=1, max_size=5), label="seq_len, query_len")
    batch = paged_batch(
        [seq_len for seq_len, _ in requests],
        [query_len for _, query_len in requests],
        num_heads=num_kv_heads * data.draw(st.sampled_from([1, 3, 4, 8]), label="queries_per_kv"),
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.sampled_from([16, 24, 64]), label="head_dim"),
        block_size=2 ** data.draw(st.integers(0, 8), label="log2_block_size"),
        layout=data.draw(st.sampled_from(["offsets_first", "heads_first", "fused"]), label="layout"),
        sliding_window=data.draw(st.none() | st.integers(1, longest), label="sliding_window"),
        seed=data.draw(st.integers(0, 9), label="seed"),
    )
    assert_matches(batch.varlen(kernels), batch.varlen(reference, torch.float64))
