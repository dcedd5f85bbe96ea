"""The random draw: argmax(p / e) with e ~ Exponential(1).

Owns the noise. Why it works: e / p is exponential with rate p, and of independent exponentials the one
with rate p_i is the smallest with probability p_i / sum(p). No cumulative sum, no host
synchronisation, p need not be normalised. Invariant: a row with its own generator fills its own noise
from it, always the same amount, so its draw is the same in every batch, and a generator can be brought
to where it was after any number of draws.

On a CPU the noise for 49,152 tokens costs ten times more than the rest of the sampler, so the same rule
is applied twice: to the total probability of each block of 128 tokens, then inside the winning block.
The distribution is the same: P(block) * P(token | block).

vLLM: `random_sample` in `vllm/v1/sample/ops/topk_topp_sampler.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from course_lib.sampling import blocks


def draw(probs: torch.Tensor, generators: Mapping[int, torch.Generator],
         default_generator: torch.Generator) -> torch.Tensor:
    """One token id per row: probs [R, V] float32, any positive scale -> [R] int64.

    `generators` maps rows to their own generators; the other rows share `default_generator`.
    """
    if probs.device.type != "cpu":
        return draw_flat(probs, generators, default_generator)
    rows, vocab = probs.shape
    block_mass = blocks.reduce_blocks(probs, torch.sum)
    num_blocks = block_mass.shape[1]
    noise = _exponential(rows, num_blocks + blocks.BLOCK, probs.device, generators, default_generator)
    block = block_mass.div_(noise[:, :num_blocks]).argmax(dim=1, keepdim=True)
    columns = blocks.block_columns(block)
    outside = columns >= vocab
    inside = probs.gather(1, columns.clamp_(max=vocab - 1)).masked_fill_(outside, 0.0)
    winner = inside.div_(noise[:, num_blocks:]).argmax(dim=1, keepdim=True)
    return columns.gather(1, winner).squeeze(1)


def draw_flat(probs: torch.Tensor, generators: Mapping[int, torch.Generator],
              default_generator: torch.Generator) -> torch.Tensor:
    """As `draw`, with noise for every token: one step, the fast way on a GPU."""
    noise = _exponential(*probs.shape, probs.device, generators, default_generator)
    return noise.reciprocal_().mul_(probs).argmax(dim=1)


def skip_draws(generator: torch.Generator, vocab: int, count: int) -> None:
    """Bring a row's new generator to where `count` calls of `draw` over `vocab` tokens leave it."""
    width = vocab if generator.device.type != "cpu" else -(-vocab // blocks.BLOCK) + blocks.BLOCK
    noise = torch.empty(width, device=generator.device)
    for _ in range(count):
        noise.exponential_(generator=generator)


def _exponential(rows: int, width: int, device: torch.device, generators: Mapping[int, torch.Generator],
                 default_generator: torch.Generator) -> torch.Tensor:
    """[rows, width] float32 draws of Exponential(1)."""
    noise = torch.empty(rows, width, device=device)
    if len(generators) < rows:
        noise.exponential_(generator=default_generator)
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return noise
