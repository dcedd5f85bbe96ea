"""Reductions over the vocabulary in two steps: over blocks of 128 tokens, then inside one block.

Why: on a CPU `argmax` and `topk` over 49,152 columns are scalar loops, while the sum and the maximum
of a block are vector code; and a random draw needs noise for the blocks and for one block (512
numbers), not for every token. Invariant: a row's result depends on that row alone, bit for bit, never
on how many rows there are.

vLLM has no counterpart: on a GPU the one-step kernels are the fast ones, and they are used there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 128


def reduce_blocks(x: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[R, V] -> [R, ceil(V / BLOCK)] by `torch.amax` or `torch.sum`; the last block may be short."""
    whole = x.shape[1] // BLOCK
    parts = []
    if whole:
        parts.append(reduce(x[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)), -1))
    if x.shape[1] > whole * BLOCK:
        parts.append(reduce(x[:, whole * BLOCK:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def block_columns(blocks: torch.Tensor) -> torch.Tensor:
    """Token ids of the given blocks [R, B] -> [R, B * BLOCK]; ids may lie beyond the vocabulary."""
    offsets = torch.arange(BLOCK, device=blocks.device)
    return (blocks.unsqueeze(-1) * BLOCK + offsets).flatten(1)


def argmax(x: torch.Tensor) -> torch.Tensor:
    """[R, V] -> [R] int64, the first of equal maxima."""
    if x.device.type != "cpu":
        return x.argmax(dim=-1)
    best = reduce_blocks(x, torch.amax).argmax(dim=-1, keepdim=True)
    columns = block_columns(best).clamp_(max=x.shape[1] - 1)  # repeats of the last column never win
    return columns.gather(1, x.gather(1, columns).argmax(dim=-1, keepdim=True)).squeeze(1)


def topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row in descending order: values and int64 ids, [R, k] each."""
    rows, width = x.shape
    if x.device.type != "cpu" or k * BLOCK * 4 > width:
        return x.topk(k, dim=-1)
    # The k largest lie in the k blocks with the largest maxima.
    blocks = reduce_blocks(x, torch.amax).topk(k, dim=-1, sorted=False).indices
    columns = block_columns(blocks)
    outside = columns >= width
    candidates = x.gather(1, columns.clamp_(max=width - 1)).masked_fill_(outside, float("-inf"))
    values, positions = candidates.topk(k, dim=-1)
    return values, columns.gather(1, positions)
