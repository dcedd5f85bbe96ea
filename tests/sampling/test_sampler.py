"""The sampler's steps, one by one and together: order, masks, independence of batch mates, logprobs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.sampling.metadata import SamplingMetadata
from course_lib.sampling.sampler import Sampler, compute_logprobs, gather_logprobs
from tests.sampling.reference import generator, random_metadata

VOCAB = 500
NEG_INF = -math.inf


def _greedy(rows: int, **fields: object) -> SamplingMetadata:
    fields.setdefault("output_token_ids", [[] for _ in range(rows)])
    return SamplingMetadata(temperature=None, all_greedy=True, all_random=False,
                            default_generator=generator(), **fields)


def _logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=generator(seed)) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_is_the_first_argmax(dtype: torch.dtype) -> None:
    logits = _logits(7).to(dtype)
    state = torch.random.get_rng_state()
    before = logits.clone()
    sampled = Sampler()(logits, _greedy(7)).sampled_token_ids
    assert sampled.dtype == torch.int64
    assert sampled.tolist() == [row.index(max(row)) for row in logits.tolist()]
    Sampler()(logits, random_metadata(7, top_p=0.9, logit_bias={0: {1: 5.0}}))
    assert torch.equal(logits, before)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's global generator was used"


def test_greedy_and_random_rows_in_one_batch() -> None:
    logits = _logits(300)
    metadata = random_metadata(300, temperature=2.0)
    metadata.temperature[::2] = 0.0
    metadata.all_random = False
    sampled, best = Sampler()(logits, metadata).sampled_token_ids, logits.argmax(-1)
    assert torch.equal(sampled[::2], best[::2])
    assert (sampled[1::2] != best[1::2]).float().mean() > 0.3


ROW_SETTING = st.fixed_dictionaries({
    "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]), "top_k": st.sampled_from([0, 1, 3, 40, 490]),
    "top_p": st.sampled_from([1.0, 0.2, 0.9, 0.999]), "min_p": st.sampled_from([0.0, 0.0, 0.05]),
    "seed": st.one_of(st.none(), st.integers(0, 9)), "row": st.integers(0, 19),
})


def _batch(settings_: list[dict], pool: torch.Tensor) -> tuple[torch.Tensor, SamplingMetadata]:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([s[name] for s in settings_])

    temperature = column("temperature")
    metadata = SamplingMetadata(
        temperature=temperature, all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()), default_generator=generator(99),
        top_k=column("top_k").int(), top_p=column("top_p"), min_p=column("min_p"),
        generators={i: generator(s["seed"]) for i, s in enumerate(settings_) if s["seed"] is not None})
    return pool[[s["row"] for s in settings_]], metadata


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=60, deadline=None)
@given(own=ROW_SETTING.filter(lambda s: s["seed"] is not None), mates=st.lists(ROW_SETTING, max_size=6),
       place=st.integers(0, 6))
def test_seeded_rows_do_not_depend_on_batch_mates(dtype: torch.dtype, own: dict, mates: list[dict],
                                                  place: int) -> None:
    pool = _logits(20).to(dtype)  # bfloat16 has ties
    place = min(place, len(mates))
    alone, together = _batch([own], pool), _batch([*mates[:place], own, *mates[place:]], pool)
    for _ in range(5):
        first = Sampler()(*alone).sampled_token_ids[0]
        assert Sampler()(*together).sampled_token_ids[place] == first


def test_unseeded_rows_follow_the_engine_generator() -> None:
    logits = _logits(1).expand(200, -1)
    draws = [Sampler()(logits, random_metadata(200, seed=seed)).sampled_token_ids for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_allowed_bias_bad_words_and_min_tokens() -> None:
    logits = torch.zeros(6, 10)
    logits[:, 3], logits[:, 4], logits[:, 5] = 9.0, 8.0, 7.0
    metadata = _greedy(
        6, output_token_ids=[[], [], [8, 1, 2], [8, 1], [1, 2], [1, 2, 3]],
        allowed_token_ids={0: [5, 7]}, logit_bias={1: {7: 9.5, 3: -1.0}},
        bad_words_token_ids={2: [[1, 2, 3], [4]], 3: [[1, 2, 3]]},  # only row 2 is about to complete it
        min_tokens={4: (3, frozenset({3, 4})), 5: (3, frozenset({3, 4}))})
    assert Sampler()(logits, metadata).sampled_token_ids.tolist() == [5, 7, 5, 3, 5, 3]
    processed = Sampler.process(logits, metadata)
    assert (processed[0] > NEG_INF).nonzero().flatten().tolist() == [5, 7]
    assert torch.equal(processed[3], logits[3]) and torch.equal(processed[5], logits[5])


def test_short_bad_word_prefix_is_not_matched_by_an_empty_output() -> None:
    logits = torch.zeros(1, 5)
    for output, forbidden in (([], False), ([1], True), ([2], False), ([2, 1], True)):
        metadata = _greedy(1, output_token_ids=[output], bad_words_token_ids={0: [[1, 3]]})
        assert bool(Sampler.process(logits, metadata)[0, 3] == NEG_INF) == forbidden


def _dense_penalties(logits: torch.Tensor, prompts: list[list[int]], outputs: list[list[int]],
                     r: list[float], f: list[float], p: list[float]) -> torch.Tensor:
    result = logits.double().tolist()
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for token in set(prompt) | set(output):
            x = result[row][token]
            result[row][token] = x / r[row] if x > 0 else x * r[row]
        for token in set(output):
            result[row][token] -= f[row] * output.count(token) + p[row]
    return torch.tensor(result, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_penalties_equal_the_formulas(data: st.DataObject) -> None:
    rows, vocab = data.draw(st.integers(1, 4)), 12
    tokens = st.lists(st.integers(0, vocab - 1), max_size=8)
    prompts = [data.draw(tokens) for _ in range(rows)]
    outputs = [data.draw(tokens) for _ in range(rows)]
    r, f, p = ([data.draw(st.sampled_from(values)) for _ in range(rows)]
               for values in ((1.0, 1.5, 0.5), (0.0, 0.5, -1.0), (0.0, 1.0, -2.0)))
    logits = torch.randn(rows, vocab, generator=generator(data.draw(st.integers(0, 99))))
    width = max(map(len, prompts))
    metadata = _greedy(
        rows, output_token_ids=outputs, no_penalties=False, repetition_penalties=torch.tensor(r),
        frequency_penalties=torch.tensor(f), presence_penalties=torch.tensor(p),
        prompt_token_ids=torch.tensor([x + [vocab] * (width - len(x)) for x in prompts], dtype=torch.int64))
    torch.testing.assert_close(Sampler.process(logits, metadata).double(),
                               _dense_penalties(logits, prompts, outputs, r, f, p), rtol=1e-6, atol=1e-6)


def test_extreme_penalty_stays_finite() -> None:
    metadata = random_metadata(
        1, temperature=0.01, no_penalties=False, repetition_penalties=torch.tensor([1e-38]),
        frequency_penalties=torch.zeros(1), presence_penalties=torch.zeros(1),
        prompt_token_ids=torch.tensor([[3]]), output_token_ids=[[]])
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert Sampler()(logits, metadata).sampled_token_ids.tolist() == [3]


def test_logits_processors_of_both_signatures_after_the_penalties() -> None:
    seen = []

    def short(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append((output_ids, logits.clone()))
        return logits * 2

    class Long:
        def __call__(self, prompt_ids: list[int], output_ids: list[int],
                     logits: torch.Tensor) -> torch.Tensor:
            seen.append((prompt_ids, output_ids, logits.clone()))
            logits = torch.full_like(logits, NEG_INF)
            logits[1] = math.inf  # how scripts force a token
            return logits

    logits = torch.tensor([[3.0, 1.0, 2.0]] * 2)
    metadata = _greedy(
        2, output_token_ids=[[], [0]], logits_processors={1: ([short, Long()], [2, 2])}, no_penalties=False,
        repetition_penalties=torch.ones(2), frequency_penalties=torch.zeros(2),
        presence_penalties=torch.tensor([0.0, 2.5]), prompt_token_ids=torch.full((2, 1), 3))
    for own in (metadata, random_metadata(2)):
        own.logits_processors, own.output_token_ids = metadata.logits_processors, metadata.output_token_ids
        assert Sampler()(logits, own).sampled_token_ids[1] == 1
    assert Sampler()(logits, metadata).sampled_token_ids.tolist() == [0, 1]
    assert seen[0][0] == [0] and seen[0][1].tolist() == [0.5, 1.0, 2.0]
    assert seen[1][:2] == ([2, 2], [0]) and seen[1][2].tolist() == [1.0, 2.0, 4.0]


def test_a_processor_that_returns_no_logits_is_named() -> None:
    for broken in (lambda output_ids, logits: None, lambda output_ids, logits: logits[:2]):
        metadata = _greedy(1, logits_processors={0: ([broken], [])})
        with pytest.raises(ValueError, match="logits_processors"):
            Sampler()(torch.zeros(1, 5), metadata)


def test_a_broken_row_harms_only_itself() -> None:
    logits = _logits(4)
    metadata = random_metadata(4, top_p=0.9, generators={i: generator(i) for i in range(4)})
    want = Sampler()(logits, metadata).sampled_token_ids
    for poison in (math.nan, math.inf, NEG_INF):
        bad = logits.clone()
        bad[2] = poison
        metadata = random_metadata(4, top_p=0.9, generators={i: generator(i) for i in range(4)})
        got = Sampler()(bad, metadata).sampled_token_ids
        assert got[[0, 1, 3]].equal(want[[0, 1, 3]]) and 0 <= got[2] < VOCAB


@pytest.mark.parametrize("num", [0, 1, 5, -1, VOCAB + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(num: int, dtype: torch.dtype) -> None:
    """Of the unmodified logits, whatever the sampler does to them; ranks count strictly larger ones."""
    logits = _logits(6).to(dtype)
    metadata = random_metadata(6, temperature=3.0, max_num_logprobs=num, logit_bias={0: {7: 100.0}})
    output = Sampler()(logits, metadata)
    exact = logits.double().log_softmax(-1)
    tensors = output.logprobs
    width = 1 + (VOCAB if num == -1 else min(num, VOCAB))
    assert tensors.token_ids.shape == tensors.logprobs.shape == (6, width)
    assert (tensors.token_ids.dtype, tensors.logprobs.dtype, tensors.ranks.dtype) == (
        torch.int32, torch.float32, torch.int32)
    assert output.sampled_token_ids[0] == 7
    assert torch.equal(tensors.token_ids[:, 0].long(), output.sampled_token_ids)
    torch.testing.assert_close(tensors.logprobs.double(), exact.gather(1, tensors.token_ids.long()),
                               rtol=0, atol=1e-5)
    for row in range(6):
        own = logits[row, output.sampled_token_ids[row]]
        assert tensors.ranks[row] == 1 + int((logits[row] > own).sum())
        values = logits[row, tensors.token_ids[row, 1:].long()]
        assert torch.equal(values, logits[row].sort(descending=True).values[: width - 1])
        assert len(set(tensors.token_ids[row, 1:].tolist())) == width - 1


def test_gather_for_prompt_tokens() -> None:
    logprobs = compute_logprobs(_logits(3).half())
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(3))
    result = gather_logprobs(logprobs, 2, torch.tensor([1, 2, 3]))
    assert result.token_ids[:, 0].tolist() == [1, 2, 3]
    assert torch.equal(result.logprobs[:, 0], logprobs[range(3), [1, 2, 3]])
