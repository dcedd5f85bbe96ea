"""A mixture of experts in the place of an MLP: each token goes through the few experts its router picks.

(Sparsely-gated mixture of experts, arXiv 1701.06538; Mixtral, arXiv 2401.04088.) Owns the order of things: bring
tokens together, route them, compute, bring outputs back. Routing is done where tokens have been brought to, by every
rank for all tokens it sees: that is cheaper than sending decisions along, and all ranks decide alike, because they
see the same numbers.

vLLM: `model_executor/layers/fused_moe/layer.py` (`FusedMoE`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from course_lib.layers.expert_exchange import ExpertExchange
from course_lib.layers.experts import Experts
from course_lib.layers.linear import Linear
from course_lib.layers.routing import route
from course_lib.layers.weights import FusedModule, WeightSlot


class Router(Linear, FusedModule):
    """Scores of all experts: x [T, hidden] -> [T, E]. On every rank whole; `name` is the checkpoint's."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        name: str = "gate",
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=False, dtype=dtype, device=device)
        self.name = name

    def parts(self) -> Iterator[tuple[str, WeightSlot]]:
        yield f"{self.name}.weight", WeightSlot(self.weight, slice(None), tuple(self.weight.shape))


class MoE(nn.Module):
    """hidden [T, N] -> [T, N], on every rank the same for the same tokens.

    `renormalize`: the chosen experts' weights are to add up to one.
    """

    def __init__(self, router: Router, experts: Experts, *, top_k: int, renormalize: bool) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.top_k, self.renormalize = top_k, renormalize
        self.exchange: ExpertExchange | None = None

    def bind(self, exchange: ExpertExchange) -> None:
        """Say how tokens travel; one exchange serves all layers of a model."""
        self.exchange = exchange

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.exchange.combine(self.contribution(self.exchange.dispatch(hidden)))

    def contribution(self, tokens: torch.Tensor) -> torch.Tensor:
        """What this rank's experts add to the outputs of `tokens` [A, N] -> [A, N]."""
        weights, expert_ids = route(self.router(tokens), self.top_k, renormalize=self.renormalize)
        return self.experts(tokens, weights, expert_ids)
