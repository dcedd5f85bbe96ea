"""The workloads are what they say, and the same every time."""

from __future__ import annotations

import pytest

from course_lib.bench import traffic
from course_lib.bench.workloads import (
    WORKLOADS,
    WorkItem,
    longest_sequence,
    nanovllm,
    output_tokens,
    poisson,
    reusable_tokens,
    shared_prefix,
    single,
    uniform,
)

VOCAB = 49152


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_is_deterministic_and_in_the_vocabulary(name: str) -> None:
    arguments = {"rate": 3.0} if name == "poisson" else {}
    for vocab_size in (61, VOCAB):
        items = WORKLOADS[name](vocab_size, **arguments)
        assert items == WORKLOADS[name](vocab_size, **arguments)
        assert all(0 <= token < vocab_size for item in items for token in item.prompt_token_ids)
        assert all(item.max_tokens > 0 and item.prompt_token_ids for item in items)


def test_single_and_uniform() -> None:
    [item] = single(VOCAB)
    assert (len(item.prompt_token_ids), item.max_tokens, item.arrival_s) == (16, 128, 0)
    items = uniform(VOCAB)
    assert len(items) == 64 and {item.max_tokens for item in items} == {64}
    lengths = {len(item.prompt_token_ids) for item in items}
    assert min(lengths) >= 16 and max(lengths) <= 64 and len(lengths) > 20
    assert items != uniform(VOCAB, seed=1)


def test_nanovllm_is_nano_vllms_own_benchmark() -> None:
    """Its README reports 133,966 output tokens; the prompts follow from the same seed."""
    items = nanovllm(VOCAB)
    assert len(items) == 256
    assert output_tokens(items) == 133_966 and sum(len(item.prompt_token_ids) for item in items) == 142_827
    assert nanovllm(VOCAB, num_prompts=32) == items[:32]
    capped = nanovllm(VOCAB, longest_output=512)
    assert [min(item.max_tokens, 512) for item in items] == [item.max_tokens for item in capped]
    assert longest_sequence(items) <= 2048


def test_four_of_five_share_their_first_512_tokens() -> None:
    items = shared_prefix(VOCAB, num_prompts=50)
    heads = [tuple(item.prompt_token_ids[:512]) for item in items]
    shared = max(set(heads), key=heads.count)
    assert heads.count(shared) == 40 and len(set(heads)) == 11
    assert all(512 + 16 <= len(item.prompt_token_ids) <= 512 + 64 for item in items)
    assert all(heads[start : start + 5].count(shared) == 4 for start in range(0, 50, 5))


def test_what_a_cache_can_spare_is_counted_from_the_prompts() -> None:
    def items(*prompts: str) -> list[WorkItem]:
        return [WorkItem(list(prompt.encode()), 1) for prompt in prompts]

    assert reusable_tokens(items("abcdef", "abcdxy"), 2) == 4
    assert reusable_tokens(items("abcdef", "abcdef"), 2) == 4, "its last token is computed, so its last block is"
    assert reusable_tokens(items("abcdef", "abcdefg"), 2) == 6
    assert reusable_tokens(items("abcdef", "abcd", "xbcdef"), 2) == 2
    assert reusable_tokens(items("abcde", "abcde"), 4) == 4
    shared = shared_prefix(VOCAB)  # 52 of 64 share, one of them is the first
    shares = sum(item.prompt_token_ids[:512] == shared[1].prompt_token_ids[:512] for item in shared)
    assert reusable_tokens(shared, 16) == (shares - 1) * 512 == 50 * 512


def test_poisson_arrives_at_the_given_rate() -> None:
    items = poisson(VOCAB, rate=4.0, num_prompts=2000)
    arrivals = [item.arrival_s for item in items]
    assert arrivals == sorted(arrivals) and arrivals[0] > 0
    assert arrivals[-1] == pytest.approx(2000 / 4.0, rel=0.1)
    gaps = [b - a for a, b in zip(arrivals, arrivals[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.15), "exponential gaps deviate by their mean"


def test_bytes_moved_counts_every_step_of_every_request() -> None:
    items = [WorkItem([0] * 5, 3), WorkItem([0] * 2, 1)]
    read = (5 + 6 + 7) + 2
    written = (5 + 2) + 2
    assert traffic.kv_tokens(items) == read + written
    assert traffic.bytes_moved(items, steps=3, weights=1000, kv_bytes_per_token=10) == 3000 + 10 * (read + written)
