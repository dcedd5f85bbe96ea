"""Draws against the exact distribution, by chi-square with fixed seeds; and proof that the test has
power: samplers with a plausible mistake fail it."""

from __future__ import annotations

import math

import pytest
import torch

from course_lib.sampling import draw as draw_module
from course_lib.sampling.draw import draw, draw_flat
from course_lib.sampling.sampler import Sampler
from tests.sampling.reference import (
    chi_square_p_value, count_draws, exact_distribution, generator, random_metadata, softmax,
)

ROWS = 20_000
RIGHT, WRONG = 1e-4, 1e-9  # a right sampler stays above, a wrong one falls below
SMALL = [float(x) for x in (2.0, 1.5, 1.5, 0.7, 0.0, -0.3, -0.3, -1.0, -2.5, -4.0)]
LARGE = torch.randn(300, generator=generator(5)).mul(2).tolist()  # two full blocks and a short one

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 4},
    {"top_k": 2},  # a tie at the second place: three tokens stay
    {"top_p": 0.7},
    {"top_p": 0.95, "temperature": 1.4},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("logits", [SMALL, LARGE], ids=["10 tokens", "300 tokens"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draws_follow_the_exact_distribution(logits: list[float], setting: dict) -> None:
    counts = count_draws(logits, ROWS, seed=1, **setting)
    assert chi_square_p_value(counts, exact_distribution(logits, **setting)) > RIGHT


@pytest.mark.parametrize(("setting", "mistake"), [
    ({"temperature": 0.9}, {"temperature": 1.0}),
    ({"top_k": 4}, {"top_k": 5}),
    ({"top_p": 0.7}, {"top_p": 0.5}),  # leaves out the token that crosses the border
    ({"min_p": 0.2}, {"min_p": 0.1}),
    ({"top_k": 5, "top_p": 0.8}, {"top_k": 5, "top_p": 0.9}),
], ids=str)
def test_a_wrong_setting_fails_the_same_test(setting: dict, mistake: dict) -> None:
    counts = count_draws(SMALL, ROWS, seed=1, **mistake)
    assert chi_square_p_value(counts, exact_distribution(SMALL, **setting)) < WRONG


@pytest.mark.parametrize("noise", ["uniform", "shared by rows", "normal"])
def test_a_wrong_noise_fails_the_same_test(noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: int, width: int, device: object, generators: object,
              default: torch.Generator) -> torch.Tensor:
        if noise == "uniform":
            return torch.rand(rows, width, generator=default)
        if noise == "normal":
            return torch.randn(rows, width, generator=default).abs()
        return torch.empty(1, width).exponential_(generator=default).repeat(rows, 1)

    monkeypatch.setattr(draw_module, "_exponential", wrong)
    counts = count_draws(LARGE, ROWS, seed=1)
    assert chi_square_p_value(counts, exact_distribution(LARGE)) < WRONG


@pytest.mark.parametrize("function", [draw, draw_flat])
def test_both_draws_take_unnormalised_weights(function: object) -> None:
    weights = torch.tensor(LARGE).exp().expand(ROWS, -1).contiguous() * 7
    counts = torch.bincount(function(weights, {}, generator(2)), minlength=len(LARGE))
    assert chi_square_p_value(counts, softmax(LARGE)) > RIGHT


def test_one_seeded_request_over_many_steps() -> None:
    """One generator used step after step: the right distribution, and each step independent of the one
    before."""
    steps, own = 3000, generator(123)
    logits = torch.tensor([LARGE])
    metadata = random_metadata(1, top_k=4, generators={0: own})
    drawn = [int(Sampler()(logits, metadata).sampled_token_ids) for _ in range(steps)]
    probs = exact_distribution(LARGE, top_k=4)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(LARGE))
    assert chi_square_p_value(counts, probs) > RIGHT

    kept = [i for i, q in enumerate(probs) if q > 0]
    pairs = torch.zeros(len(kept) ** 2, dtype=torch.int64)
    for first, second in zip(drawn[::2], drawn[1::2], strict=True):
        pairs[kept.index(first) * len(kept) + kept.index(second)] += 1
    assert chi_square_p_value(pairs, [probs[a] * probs[b] for a in kept for b in kept]) > RIGHT


def test_first_draws_of_neighbouring_seeds() -> None:
    """n > 1 gives output i the seed + i: the outputs' first tokens must follow the distribution too."""
    rows = 4000
    metadata = random_metadata(rows, generators={i: generator(i) for i in range(rows)})
    drawn = Sampler()(torch.tensor([SMALL]).repeat(rows, 1), metadata).sampled_token_ids
    counts = torch.bincount(drawn, minlength=len(SMALL))
    assert chi_square_p_value(counts, exact_distribution(SMALL)) > RIGHT


def _with_penalties(logits: list[float], prompt: list[int], output: list[int], repetition: float,
                    frequency: float, presence: float) -> list[float]:
    result = []
    for token, x in enumerate(logits):
        if token in prompt or token in output:
            x = x / repetition if x > 0 else x * repetition
        count = output.count(token)
        result.append(x - frequency * count - presence * (count > 0))
    return result


@pytest.mark.parametrize(("repetition", "frequency", "presence"), [
    (1.5, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 1.2), (1.3, 0.4, -0.8), (0.7, -0.5, 0.0),
])
def test_draws_with_penalties_and_bias(repetition: float, frequency: float, presence: float) -> None:
    prompt, output, bias = [0, 7, 7], [1, 1, 4, 3], {2: 1.0, 9: 5.5}
    setting = {"temperature": 0.9, "top_p": 0.9}

    def counts(**wrong: float) -> torch.Tensor:
        penalties = {"repetition_penalties": repetition, "frequency_penalties": frequency,
                     "presence_penalties": presence} | wrong
        return count_draws(
            SMALL, ROWS, seed=3, **setting, no_penalties=False, logit_bias=dict.fromkeys(range(ROWS), bias),
            prompt_token_ids=torch.tensor([prompt + [len(SMALL)]]).expand(ROWS, -1),
            output_token_ids=[output] * ROWS,
            **{name: torch.full((ROWS,), value) for name, value in penalties.items()})

    # vLLM's order: the bias comes before the penalties.
    biased = [x + bias.get(token, 0.0) for token, x in enumerate(SMALL)]
    wanted = exact_distribution(
        _with_penalties(biased, prompt, output, repetition, frequency, presence), **setting)
    assert chi_square_p_value(counts(), wanted) > RIGHT
    for name, value in (("repetition_penalties", repetition * 1.2), ("frequency_penalties", frequency + 0.2),
                        ("presence_penalties", presence + 0.3)):
        assert chi_square_p_value(counts(**{name: value}), wanted) < WRONG


def test_chi_square_tail() -> None:
    """Known values: P(chi2 with 1 degree > 3.841) = 0.05, with 9 degrees > 21.666 = 0.01."""
    two = torch.tensor([500 + 31, 500 - 31])  # statistic 2 * 31^2 / 500 = 3.844
    assert math.isclose(chi_square_p_value(two, [0.5, 0.5]), 0.0499, abs_tol=2e-4)
    assert chi_square_p_value(torch.tensor([5, 0]), [0.0, 1.0]) == 0.0
