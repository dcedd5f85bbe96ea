"""What is measured: prompts that are the same on every machine."""

from __future__ import annotations

import random


def random_prompts(count: int, shortest: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of random token ids, lengths uniform in [shortest, longest].

    Ids below 100 are left out: special tokens live there.
    """
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(100, vocab_size) for _ in range(length)] for length in lengths]
