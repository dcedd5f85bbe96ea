"""What is measured: five workloads, the same prompts on every machine.

Each is a pure function of its arguments that returns `WorkItem`s; token ids and lengths are random, end-of-sequence
tokens are ignored, so every side produces exactly `max_tokens` for every prompt. `WORKLOADS` names them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

_FIRST_ID = 100  # special tokens live below
_SHARED_FRACTION = 0.8
SHARED_TOKENS = 512


class WorkItem(NamedTuple):
    """One request."""

    prompt_token_ids: list[int]
    max_tokens: int
    arrival_s: float = 0.0  # seconds after the start


def single(vocab_size: int, *, input_len: int = 16, output_len: int = 128, seed: int = 0) -> list[WorkItem]:
    """One request of `input_len` tokens, `output_len` new ones."""
    rng = random.Random(seed)
    return [WorkItem(_ids(rng, input_len, vocab_size), output_len)]


def uniform(
    vocab_size: int,
    *,
    num_prompts: int = 64,
    input_len: tuple[int, int] = (16, 64),
    output_len: int = 64,
    seed: int = 0,
) -> list[WorkItem]:
    """`num_prompts` requests, prompt lengths uniform in `input_len` (ends included), `output_len` new tokens each."""
    rng = random.Random(seed)
    lengths = [rng.randint(*input_len) for _ in range(num_prompts)]
    return [WorkItem(_ids(rng, length, vocab_size), output_len) for length in lengths]


def nanovllm(vocab_size: int, *, num_prompts: int = 256, longest_output: int = 1024, seed: int = 0) -> list[WorkItem]:
    """The benchmark of nano-vllm: input and output lengths uniform in 100..1024, ids uniform in 0..10,000.

    The draws are those of nano-vllm's `bench.py`, so with the defaults there are the 142,827 prompt tokens and 133,966
    new ones that its README reports. `num_prompts` cuts it: the first prompts stay the same. `longest_output` caps
    each request's new tokens.
    """
    rng = random.Random(seed)
    highest = min(10_000, vocab_size - 1)
    prompts = [[rng.randint(0, highest) for _ in range(rng.randint(100, 1024))] for _ in range(max(256, num_prompts))]
    outputs = [rng.randint(100, 1024) for _ in prompts]
    return [WorkItem(p, min(n, longest_output)) for p, n in zip(prompts, outputs, strict=True)][:num_prompts]


def shared_prefix(vocab_size: int, *, num_prompts: int = 64, output_len: int = 64, seed: int = 0) -> list[WorkItem]:
    """Of every five requests four begin with the same 512 tokens and end in 16 to 64 of their own; the fifth has as
    many tokens, all its own."""
    rng = random.Random(seed)
    prefix = _ids(rng, SHARED_TOKENS, vocab_size)
    items = []
    for i in range(num_prompts):
        shares = (i + 1) * _SHARED_FRACTION // 1 > i * _SHARED_FRACTION // 1  # spread evenly: exact in every five
        head = prefix if shares else _ids(rng, SHARED_TOKENS, vocab_size)
        items.append(WorkItem(head + _ids(rng, rng.randint(16, 64), vocab_size), output_len))
    return items


def poisson(
    vocab_size: int, *, rate: float, num_prompts: int = 64, input_len: tuple[int, int] = (16, 256),
    output_len: tuple[int, int] = (16, 128), seed: int = 0,
) -> list[WorkItem]:  # fmt: skip
    """Requests that arrive independently, `rate` a second on average: exponential gaps, the first at its own gap.

    Input and output lengths are uniform in the given ranges.
    """
    rng = random.Random(seed)
    items, now = [], 0.0
    for _ in range(num_prompts):
        now += rng.expovariate(rate)
        items.append(WorkItem(_ids(rng, rng.randint(*input_len), vocab_size), rng.randint(*output_len), now))
    return items


WORKLOADS: dict[str, Callable[..., list[WorkItem]]] = {
    "single": single, "uniform": uniform, "nanovllm": nanovllm, "shared-prefix": shared_prefix, "poisson": poisson,
}  # fmt: skip


def output_tokens(items: list[WorkItem]) -> int:
    """New tokens of all requests."""
    return sum(item.max_tokens for item in items)


def longest_sequence(items: list[WorkItem]) -> int:
    """Prompt and new tokens of the longest request: the smallest `max_model_len` that serves them all."""
    return max(len(item.prompt_token_ids) + item.max_tokens for item in items)


def reusable_tokens(items: list[WorkItem], block_size: int) -> int:
    """Prompt tokens that need not be computed if all earlier prompts are kept, the requests being served in order.

    A prompt finds its longest beginning of whole blocks that an earlier one had, and computes at least its last
    token.
    """
    seen: set[tuple[int, ...]] = set()
    total = 0
    for item in items:
        ids = item.prompt_token_ids
        beginnings = [tuple(ids[:end]) for end in range(block_size, len(ids) + 1, block_size)]
        total += block_size * sum(beginning in seen for beginning in beginnings if len(beginning) < len(ids))
        seen.update(beginnings)
    return total


def _ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    lowest = min(_FIRST_ID, vocab_size // 2)
    return [rng.randrange(lowest, vocab_size) for _ in range(count)]
