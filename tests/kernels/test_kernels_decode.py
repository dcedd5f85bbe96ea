"""paged_attention_decode against the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import reference

RAGGED = [1, 0, 37, 64, 129]  # empty, one tile, several tiles, tile borders

# num_heads, num_kv_heads, head_dim, block_size, layout, sliding_window, num_splits
CASES = [
    (1, 1, 16, 16, "offsets_first", None, None),
    (9, 3, 64, 16, "offsets_first", None, None),  # SmolLM2-135M
    (9, 3, 64, 16, "heads_first", None, 3),
    (4, 1, 80, 4, "fused", None, 2),
    (8, 1, 64, 32, "offsets_first", None, 4),
    (24, 1, 16, 16, "offsets_first", None, 2),  # more query heads than the smallest tile has rows
    (3, 3, 16, 1, "offsets_first", None, 2),
    (4, 2, 96, 256, "heads_first", None, 3),
    (2, 1, 256, 256, "fused", None, None),
    (4, 2, 16, 128, "offsets_first", 40, 1),
    (4, 2, 16, 16, "heads_first", 40, 3),
    (4, 2, 16, 4, "offsets_first", 1, 2),
    (6, 2, 64, 256, "fused", 100, 2),
]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "layout", "sliding_window", "num_splits"), CASES
)
def test_decode_matches_reference(
    triton_kernels, paged_batch, assert_matches, dtype,
    num_heads, num_kv_heads, head_dim, block_size, layout, sliding_window, num_splits,
):  # fmt: skip
    batch = paged_batch(
        RAGGED, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
        layout=layout, sliding_window=sliding_window, dtype=dtype,
    )  # fmt: skip
    actual = batch.decode(triton_kernels, num_splits=num_splits)
    assert actual.dtype == dtype
    assert actual[1].eq(0).all(), "the empty request"
    assert_matches(actual, batch.decode(reference, torch.float64))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
@pytest.mark.parametrize("sliding_window", [None, 70])
def test_number_of_splits_does_not_change_the_result(
    triton_kernels, paged_batch, assert_matches, num_splits, sliding_window
):
    """Also with far more parts than there are tiles, and in requests of one tile."""
    batch = paged_batch([200, 3], num_heads=3, num_kv_heads=1, block_size=8, sliding_window=sliding_window)
    actual = batch.decode(triton_kernels, num_splits=num_splits)
    assert_matches(actual, batch.decode(reference, torch.float64))


def test_large_scores_do_not_overflow(triton_kernels, paged_batch):
    """Scores in the hundreds: exp of them, without subtracting the running maximum, is infinite."""
    batch = paged_batch([150, 70], num_heads=2, num_kv_heads=1)
    batch.scale = 60.0
    expected = batch.decode(reference, torch.float64)
    for num_splits in (1, 3):
        actual = batch.decode(triton_kernels, num_splits=num_splits).double()
        # A score of 500 is known to 500 * 2**-24 in float32, and its exponential relatively so.
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_writes_into_a_strided_out(triton_kernels, paged_batch, device, assert_matches):
    batch = paged_batch([20, 45])
    for num_splits in (1, 2):
        whole = torch.full((2, 6, 20), 7.0, device=device)
        out = whole[:, 1:5, :16]
        assert batch.decode(triton_kernels, num_splits=num_splits, out=out) is out
        assert_matches(out, batch.decode(reference, torch.float64))
        assert whole.eq(7).sum() == whole.numel() - out.numel()


def test_splits_are_chosen_from_shapes_only(triton_kernels, paged_batch, assert_matches, monkeypatch):
    """On a device of 132 multiprocessors two long sequences are split, and the result is the same."""
    from kernels.triton import tiles

    monkeypatch.setattr(tiles, "_multiprocessors", lambda device: 132)
    cpu = torch.device("cpu")
    assert tiles.choose_num_splits(8, 3, 8192, cpu) == 32
    assert tiles.choose_num_splits(2, 3, 300, cpu) == 2, "no part shorter than it is worth"
    assert tiles.choose_num_splits(256, 3, 8192, cpu) == 1, "the batch alone fills the device"
    assert tiles.choose_num_splits(1, 1, 10**6, cpu) == 64
    batch = paged_batch([300, 260])
    for options in ({}, {"max_seq_len": 300}):
        assert_matches(batch.decode(triton_kernels, **options), batch.decode(reference, torch.float64))


def test_empty_batch(triton_kernels, paged_batch):
    batch = paged_batch([])
    assert batch.decode(triton_kernels).shape == (0, 4, 16)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decode_property(triton_kernels, paged_batch, assert_matches, data):
    _check_random_decode(triton_kernels, paged_batch, assert_matches, data, longest=150)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_decode_property_sweep(triton_kernels, paged_batch, assert_matches, data):
    _check_random_decode(triton_kernels, paged_batch, assert_matches, data, longest=600)


def _check_random_decode(kernels, paged_batch, assert_matches, data, longest):
    num_kv_heads = data.draw(st.integers(1, 3), label="num_kv_heads")
    batch = paged_batch(
        data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=4), label="seq_lens"),
        num_heads=num_kv_heads * data.draw(st.sampled_from([1, 3, 4, 8]), label="queries_per_kv"),
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.sampled_from([16, 24, 64]), label="head_dim"),
        block_size=2 ** data.draw(st.integers(0, 8), label="log2_block_size"),
        layout=data.draw(st.sampled_from(["offsets_first", "heads_first", "fused"]), label="layout"),
        sliding_window=data.draw(st.none() | st.integers(1, longest), label="sliding_window"),
        seed=data.draw(st.integers(0, 9), label="seed"),
    )
    actual = batch.decode(kernels, num_splits=data.draw(st.none() | st.integers(1, 8), label="num_splits"))
    assert_matches(actual, batch.decode(reference, torch.float64))
