"""How tokens reach the experts that other ranks hold, and how the outputs come back.

Each rank computes what its own experts contribute to every token it is shown; contributions of several ranks are
added up. Who is shown what is this module's business:

- One replica: all its tensor ranks have the same tokens already. Nothing to send; one all-reduce adds up.
- Several replicas have different tokens. Each rank brings an equal part of its replica's tokens (the tensor ranks of
  a replica must not bring the same token twice), all parts are gathered, and the sums are scattered back to where
  the tokens came from. Parts are filled up to one size, that of the replica with the most tokens.

Invariant: all ranks of the expert group go through the same collectives, whatever their own number of tokens, zero
included; if nobody has a token, through none.

vLLM: `vllm/distributed/device_communicators/all2all.py` (`AgRsAll2AllManager`).
"""

from __future__ import annotations

from typing import Protocol

import torch

from course_lib.parallel.group import Group, ParallelGroups


class ExpertExchange(Protocol):
    """Used by every mixture-of-experts layer of a model, between two `begin`s in the same order on all ranks."""

    def begin(self, num_tokens: int) -> None:
        """A forward pass of `num_tokens` tokens of this rank's replica starts; may wait for the other replicas."""
        ...

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [num_tokens, N] -> all tokens that this rank's experts must see, [A, N]."""
        ...

    def combine(self, contributions: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """What this rank's experts contribute, [A, N] -> the sum over ranks for its own tokens, [num_tokens, N].

        `own` [num_tokens, N] is added, summed over the tensor ranks of the replica.
        """
        ...


def make_exchange(parallel: ParallelGroups) -> ExpertExchange:
    """The one that fits these groups."""
    if parallel.expert.size > parallel.tensor.size:
        return GatheredTokens(parallel.expert, parallel.tensor)
    return SharedTokens(parallel.tensor)


class SharedTokens:
    """All ranks of `tensor` have the same tokens."""

    def __init__(self, tensor: Group) -> None:
        self._tensor = tensor

    def begin(self, num_tokens: int) -> None:
        pass

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def combine(self, contributions: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        return self._tensor.all_reduce(contributions if own is None else contributions + own)


class GatheredTokens:
    """The ranks of `expert` are several replicas of the ranks of `tensor`, replica by replica."""

    def __init__(self, expert: Group, tensor: Group) -> None:
        self._expert, self._tensor = expert, tensor
        self._num_tokens = 0  # of this rank's replica
        self._part = 0  # rows that each rank brings
        self._rows: torch.Tensor | None = None  # where tokens are among the gathered rows; None: everywhere

    def begin(self, num_tokens: int) -> None:
        counts = self._expert.all_gather_object(num_tokens)[:: self._tensor.size]
        self._num_tokens = num_tokens
        self._part = -(-max(counts) // self._tensor.size)
        replica_rows = self._part * self._tensor.size
        self._rows = None
        if min(counts) < replica_rows:
            spans = [range(i * replica_rows, i * replica_rows + count) for i, count in enumerate(counts)]
            self._rows = torch.tensor([row for span in spans for row in span])

    def dispatch(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._part == 0:
            return hidden
        part = hidden.new_zeros((self._part, hidden.shape[1]))
        mine = hidden[self._tensor.rank * self._part : (self._tensor.rank + 1) * self._part]
        part[: len(mine)] = mine
        gathered = self._expert.all_gather(part)
        if self._rows is None:
            return gathered
        self._rows = self._rows.to(hidden.device)
        return gathered[self._rows]

    def combine(self, contributions: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        if self._part == 0:
            return contributions
        if self._rows is not None:
            rows = contributions.new_zeros((self._expert.size * self._part, contributions.shape[1]))
            contributions = rows.index_copy_(0, self._rows, contributions)
        part = self._expert.reduce_scatter(contributions)
        if self._num_tokens == 0:  # on all tensor ranks
            return part[:0]
        combined = self._tensor.all_gather(part)[: self._num_tokens]
        return combined if own is None else combined + self._tensor.all_reduce(own)
