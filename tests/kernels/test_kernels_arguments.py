"""Wrong arguments are refused before a launch, with an error that names the argument."""

import pytest
import torch


def _attention_arguments(device, **changes):
    arguments = {
        "query": torch.zeros(2, 4, 16, device=device),
        "k_cache": torch.zeros(3, 8, 2, 16, device=device),
        "v_cache": torch.zeros(3, 8, 2, 16, device=device),
        "block_table": torch.zeros(2, 2, dtype=torch.int32, device=device),
        "seq_lens": torch.ones(2, dtype=torch.int32, device=device),
        "scale": 0.25,
    }
    return arguments | changes


def _half(*shape):
    return torch.zeros(*shape, dtype=torch.float16)


ATTENTION_ERRORS = {
    "query is float64": (dict(query=torch.zeros(2, 4, 16, dtype=torch.float64)), TypeError, "query is"),
    "query has 2 dimensions": (dict(query=torch.zeros(2, 64)), ValueError, "query has shape"),
    "mixed dtypes": (dict(k_cache=_half(3, 8, 2, 16)), TypeError, "k_cache is torch.float16"),
    "another head size": (dict(query=torch.zeros(2, 4, 32)), ValueError, "k_cache has head size 16"),
    "unequal caches": (dict(v_cache=torch.zeros(3, 4, 2, 16)), ValueError, "v_cache has shape"),
    "block size 6": (
        dict(k_cache=torch.zeros(3, 6, 2, 16), v_cache=torch.zeros(3, 6, 2, 16)), ValueError, "block size 6"),
    "heads not a multiple": (dict(query=torch.zeros(2, 3, 16)), ValueError, "query has 3 heads"),
    "table is int64": (dict(block_table=torch.zeros(2, 2, dtype=torch.int64)), TypeError, "block_table is"),
    "table of another batch": (
        dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), ValueError, "block_table has shape"),
    "table transposed": (
        dict(block_table=torch.zeros(2, 2, dtype=torch.int32).T), ValueError, "block_table must be contig"),
    "lengths are int64": (dict(seq_lens=torch.ones(2, dtype=torch.int64)), TypeError, "seq_lens is"),
    "window of 0": (dict(sliding_window=0), ValueError, "sliding_window is 0"),
    "out of another shape": (dict(out=torch.zeros(2, 4, 8)), ValueError, "out has shape"),
    "out of another dtype": (dict(out=_half(2, 4, 16)), TypeError, "out is torch.float16"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION_ERRORS)
@pytest.mark.parametrize("function", ["paged_attention_decode", "paged_attention_varlen"])
def test_attention_refuses(triton_kernels, device, function, case):
    changes, error, message = ATTENTION_ERRORS[case]
    changes = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in changes.items()
    }
    arguments = _attention_arguments(device, **changes)
    if function == "paged_attention_varlen":
        arguments["query_start_loc"] = torch.arange(3, dtype=torch.int32, device=device)
        arguments["max_query_len"] = 1
    with pytest.raises(error, match=message):
        getattr(triton_kernels, function)(**arguments)


def test_the_unchanged_arguments_are_accepted(triton_kernels, device):
    arguments = _attention_arguments(device)
    assert triton_kernels.paged_attention_decode(**arguments).shape == (2, 4, 16)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    result = triton_kernels.paged_attention_varlen(**arguments, query_start_loc=starts, max_query_len=1)
    assert result.shape == (2, 4, 16)


@pytest.mark.parametrize("num_splits", [0, 65])
def test_decode_refuses_num_splits(triton_kernels, device, num_splits):
    with pytest.raises(ValueError, match="num_splits is"):
        triton_kernels.paged_attention_decode(**_attention_arguments(device), num_splits=num_splits)


def test_decode_refuses_lengths_of_another_batch(triton_kernels, device):
    """Two lengths for three queries: the third would read behind seq_lens."""
    query = torch.zeros(3, 4, 16, device=device)
    with pytest.raises(ValueError, match="seq_lens has shape"):
        triton_kernels.paged_attention_decode(**_attention_arguments(device, query=query))


def test_decode_refuses_values_strided_in_the_last_dimension(triton_kernels, device):
    query = torch.zeros(2, 4, 32, device=device)[..., ::2]
    with pytest.raises(ValueError, match="query must be contiguous in its last dimension"):
        triton_kernels.paged_attention_decode(**_attention_arguments(device, query=query))


def test_varlen_refuses_its_own_arguments(triton_kernels, device):
    arguments = _attention_arguments(device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    varlen = triton_kernels.paged_attention_varlen
    with pytest.raises(ValueError, match="query_start_loc has shape"):
        varlen(**arguments, query_start_loc=starts[:2], max_query_len=1)
    with pytest.raises(TypeError, match="query_start_loc is"):
        varlen(**arguments, query_start_loc=starts.long(), max_query_len=1)
    with pytest.raises(ValueError, match="max_query_len is 0"):
        varlen(**arguments, query_start_loc=starts, max_query_len=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(key=torch.zeros(2, 3, 16)), ValueError, "key has shape"),
        (dict(value=torch.zeros(1, 2, 16)), ValueError, "value has shape"),
        (dict(v_cache=torch.zeros(3, 8, 1, 16)), ValueError, "v_cache has shape"),
        (dict(value=_half(2, 2, 16)), TypeError, "value is torch.float16"),
        (dict(slot_mapping=torch.zeros(2, dtype=torch.int32)), TypeError, "slot_mapping is torch.int32"),
        (dict(slot_mapping=torch.zeros(3, dtype=torch.int64)), ValueError, "slot_mapping has shape"),
    ],
)
def test_reshape_and_cache_refuses(triton_kernels, device, changes, error, message):
    arguments = {
        "key": torch.zeros(2, 2, 16),
        "value": torch.zeros(2, 2, 16),
        "k_cache": torch.zeros(3, 8, 2, 16),
        "v_cache": torch.zeros(3, 8, 2, 16),
        "slot_mapping": torch.tensor([0, 1]),
    } | changes
    with pytest.raises(error, match=message):
        triton_kernels.reshape_and_cache(**{name: t.to(device) for name, t in arguments.items()})


def test_interpreter_refuses_bfloat16(triton_kernels, device):
    from kernels.triton import launch

    if not launch.INTERPRETED:
        pytest.skip("compiled kernels take bfloat16")
    cache = torch.zeros(3, 8, 2, 16, dtype=torch.bfloat16)
    arguments = _attention_arguments(device, query=cache[0, :2], k_cache=cache, v_cache=cache)
    with pytest.raises(TypeError, match="query is bfloat16, which Triton's interpreter computes wrongly"):
        triton_kernels.paged_attention_decode(**arguments)
    starts = torch.arange(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="query is bfloat16"):
        triton_kernels.paged_attention_varlen(**arguments, query_start_loc=starts, max_query_len=1)
    with pytest.raises(TypeError, match="key is bfloat16"):
        triton_kernels.reshape_and_cache(cache[0], cache[0], cache, cache, torch.arange(8))
