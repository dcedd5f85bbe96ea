"""Truncation: min-p, top-k and top-p, on a sorted prefix of each row.

Owns which tokens may be drawn. Meaning, in vLLM's order:

- min-p keeps tokens at least `min_p` times as likely as the row's most likely one;
- top-k keeps the k largest of those *and every token equal to the k-th* (vLLM's rule; bfloat16 logits
  have many ties);
- top-p renormalises what is left and keeps the shortest run of tokens, most likely first and equals
  by ascending id, whose probability reaches `top_p`; at least one.

Invariant: a row's kept set depends on that row's logits and parameters alone. A full sort of 49,152
columns costs milliseconds per row, so rows are first judged on their largest 64 (exact, because the mass
of the rest is known from one softmax). For a row whose kept set may reach beyond, a histogram finds the
narrow range of logits in which the border lies, and only that is sorted.

vLLM: `vllm/v1/sample/ops/topk_topp_sampler.py` (one full sort).
"""

from __future__ import annotations

import torch

from course_lib.sampling import blocks

NEG_INF = float("-inf")
PREFIX_WIDTH = 64
BUCKETS_PER_NAT, NUM_BUCKETS = 32, 1024  # 32 nats below the maximum there is no mass left


def apply_top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None,
                      min_p: torch.Tensor | None = None) -> torch.Tensor:
    """Mask with -inf every token that may not be drawn.

    logits [R, V] float32, already divided by the temperature; k [R] int (<= 0 or >= V: off),
    p [R] float in (0, 1] (1: off), min_p [R] float in [0, 1] (0: off); None switches one off for all.
    Works in place, as vLLM's, and returns the logits. Masked input (-inf) stays masked.
    """
    rows, vocab = logits.shape
    device = logits.device
    k = torch.full((rows,), vocab, device=device) if k is None else k.to(torch.int64)
    k = torch.where((k <= 0) | (k >= vocab), vocab, k)
    p = torch.ones(rows, device=device) if p is None else p
    min_p = torch.zeros(rows, device=device) if min_p is None else min_p

    active = (k < vocab) | (p < 1) | (min_p > 0)
    width = min(PREFIX_WIDTH, vocab)
    # A row whose k-th value lies beyond the prefix need not try it.
    short = (active & ((k < width) | (k == vocab))).nonzero().squeeze(1)
    if len(short):
        x = logits if len(short) == rows else logits[short]
        ids, values, complete = _judge(x, k[short], p[short], min_p[short], width)
        _keep(logits, short[complete], ids[complete], values[complete])
        active[short[complete]] = False
    wide = active.nonzero().squeeze(1)
    if device.type == "cpu":
        for row in wide.tolist():
            logits[row] = _truncate_row(logits[row], int(k[row]), float(p[row]), float(min_p[row]))
    elif len(wide):
        ids, values, _ = _judge(logits[wide], k[wide], p[wide], min_p[wide], vocab)
        _keep(logits, wide, ids, values)
    return logits


def _keep(logits: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, values: torch.Tensor) -> None:
    """Of the given rows, leave nothing but `values` at `ids`."""
    logits.index_fill_(0, rows, NEG_INF)
    logits[rows.unsqueeze(1), ids] = values


def _judge(x: torch.Tensor, k: torch.Tensor, p: torch.Tensor, min_p: torch.Tensor,
           width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Judge rows x [N, V] on their `width` largest.

    Returns ids [N, width], values [N, width] (-inf where dropped) and complete [N]: whether nothing
    beyond the prefix can be kept.
    """
    vocab = x.shape[1]
    values, ids = _largest(x, width)
    last = values[:, -1:]

    # Both top-k and min-p are a lowest value to keep.
    kth = values.gather(1, k.clamp(max=width).unsqueeze(1) - 1)
    floor = torch.where((k < vocab).unsqueeze(1), kth, NEG_INF)
    min_p_floor = torch.where(min_p > 0, values[:, 0] + min_p.log(), NEG_INF).unsqueeze(1)
    floor = torch.maximum(floor, min_p_floor)
    kept = values >= floor

    if bool((p < 1).any()):
        # float64, because a border that moves with the width of the prefix would break the invariant.
        mass = x.softmax(dim=-1).gather(1, ids).double() * kept
        reached = mass.cumsum(dim=1)
        total = torch.where(floor > NEG_INF, reached[:, -1:], 1.0)
        before = torch.cat([torch.zeros_like(total), reached[:, :-1]], dim=1)
        p = p.double().unsqueeze(1)
        kept &= (before < p * total) | (p >= 1)
    kept[:, 0] = True

    smallest = torch.where(kept, values, float("inf")).amin(dim=1, keepdim=True)
    complete = torch.where(floor > NEG_INF, floor, smallest) > last
    complete |= width == vocab
    return ids, torch.where(kept, values, NEG_INF), complete.squeeze(1)


def _largest(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest of each row, descending, equals by ascending id."""
    if width == x.shape[1]:
        return x.sort(dim=-1, descending=True, stable=True)
    values, ids = blocks.topk(x, width)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _truncate_row(x: torch.Tensor, k: int, p: float, min_p: float) -> torch.Tensor:
    """One row [V] on the CPU, whatever the size of its kept set; the same rules as `_judge`."""
    top = x.amax()
    floor = torch.tensor(NEG_INF)
    if k < len(x):
        floor = x.topk(k).values[-1]
    if min_p > 0:
        floor = torch.maximum(floor, top + torch.tensor(min_p).log())
    x = torch.where(x < floor, NEG_INF, x)
    if p >= 1 or not bool(top.isfinite()):
        return x
    probs = x.softmax(dim=-1).double()
    bucket = ((top - x) * BUCKETS_PER_NAT).clamp_(max=NUM_BUCKETS - 1).to(torch.int64)
    mass = torch.bincount(bucket, weights=probs, minlength=NUM_BUCKETS)
    before = torch.cat([mass.new_zeros(1), mass.cumsum(0)[:-1]])  # mass of more likely buckets
    border = int((before < p).sum()) - 1
    ids = (bucket == border).nonzero().squeeze(1)
    ids = ids[x[ids].sort(dim=0, descending=True, stable=True).indices]
    reached = before[border] + probs[ids].cumsum(0) - probs[ids]
    dropped = bucket > border
    dropped[ids[reached >= p]] = True
    return x.masked_fill_(dropped, NEG_INF)
