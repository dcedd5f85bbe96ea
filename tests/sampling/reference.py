"""Sampling written to be obviously right: one row, plain Python floats, no shortcuts; and the chi-square
test that compares draws with it."""

from __future__ import annotations

import math

import torch

from course_lib.sampling.metadata import SamplingMetadata
from course_lib.sampling.sampler import Sampler


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]


def kept_tokens(logits: list[float], top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """min-p, then top-k with ties, then top-p over what is left; most likely first, equals by id."""
    probs = softmax(logits)
    least = min_p * max(probs)
    kept = {i for i, q in enumerate(probs) if q >= least and logits[i] > -math.inf}
    if 0 < top_k < len(kept):
        kth = sorted((logits[i] for i in kept), reverse=True)[top_k - 1]
        kept = {i for i in kept if logits[i] >= kth}
    if top_p < 1:
        total = sum(probs[i] for i in kept)
        reached, nucleus = 0.0, set()
        for i in sorted(kept, key=lambda i: (-logits[i], i)):
            if reached >= top_p * total:
                break
            nucleus.add(i)
            reached += probs[i]
        kept = nucleus
    return kept


def exact_distribution(logits: list[float], temperature: float = 1.0, **truncation: float) -> list[float]:
    """The distribution that one draw must have."""
    scaled = [x / temperature for x in logits]
    kept = kept_tokens(scaled, **truncation)
    return softmax([x if i in kept else -math.inf for i, x in enumerate(scaled)])


def chi_square_p_value(counts: torch.Tensor, probs: list[float]) -> float:
    """P(a chi-square at least this large | the counts come from probs); 0 if an impossible token came.

    Cells with fewer than 5 expected draws are merged, as the approximation demands.
    """
    expected = torch.tensor(probs, dtype=torch.float64) * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum().double().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_metadata(rows: int, *, seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                    min_p: float = 0.0, **fields: object) -> SamplingMetadata:
    """Metadata of `rows` equal random rows."""
    return SamplingMetadata(
        temperature=torch.full((rows,), temperature), all_greedy=False, all_random=True,
        default_generator=generator(seed),
        top_k=torch.full((rows,), top_k, dtype=torch.int32) if top_k else None,
        top_p=torch.full((rows,), top_p) if top_p < 1 else None,
        min_p=torch.full((rows,), min_p) if min_p else None,
        **fields,
    )


def count_draws(logits: list[float], rows: int, **fields: object) -> torch.Tensor:
    """How often each token comes in `rows` draws from the same logits."""
    batch = torch.tensor(logits).expand(rows, -1).contiguous()
    drawn = Sampler()(batch, random_metadata(rows, **fields)).sampled_token_ids
    return torch.bincount(drawn, minlength=len(logits))
