"""Which experts a token goes to, and with what weight. vLLM: `fused_moe/router/fused_topk_router.py`."""

from __future__ import annotations

import torch


def route(logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (weights float32 [T, top_k], expert ids int64 [T, top_k]), most likely first.

    Weights are probabilities among all experts; with `renormalize` they are divided by their sum, which is the same
    as a softmax over the chosen logits alone.
    """
    weights, expert_ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights, expert_ids
