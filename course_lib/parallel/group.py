"""A group of ranks and what they can do together.

Every rank of a group calls the same collectives in the same order, or all wait until the time limit. A rank whose
peer has died, or does not come in time, is told so by PeerLostError. Invariant: tensors given to collectives live on
the group's device and are contiguous, or are made so; results are new tensors, except that `all_reduce` may change
its argument. What goes over the wire is counted, so that formulas can be checked.

vLLM: `GroupCoordinator` in `vllm/distributed/parallel_state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from course_lib.errors import CourseError


class PeerLostError(CourseError):
    """Another rank of the group has died, hangs or is out of step; the group is of no more use."""


@dataclass(slots=True)
class Traffic:
    """What one rank has put into collectives since its group was made: calls and bytes, by kind."""

    all_reduce_calls: int = 0
    all_reduce_bytes: int = 0
    gather_calls: int = 0  # all_gather, reduce_scatter, all_to_all
    gather_bytes: int = 0
    sent_calls: int = 0
    sent_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.all_reduce_bytes + self.gather_bytes + self.sent_bytes


class Sending(Protocol):
    """A tensor on its way to one rank."""

    def wait(self) -> object:
        """Return when it has gone."""
        ...


class Group(Protocol):
    """`rank` of `size` ranks, numbered within the group."""

    rank: int
    size: int
    traffic: Traffic

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, same shape; `tensor` may be overwritten with it."""
        ...

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """All ranks' tensors (of one shape) one after another along `dim`."""
        ...

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, of which this rank gets its share of dimension 0."""
        ...

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Rows of `tensor`: the first `send[0]` go to rank 0, and so on; returns first `receive[0]` of rank 0."""
        ...

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Hand `tensor` to rank `to`, which must receive the same shape and dtype. Returns when it has gone, which
        may be when `to` receives it."""
        ...

    def isend(self, tensor: torch.Tensor, to: int) -> Sending:
        """As `send`, but return at once. Before the result's `wait`, `tensor` must not change, nor it be dropped."""
        ...

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> torch.Tensor:
        """Wait for a tensor from rank `source`."""
        ...

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, through host memory. Small things: it pickles."""
        ...

    def close(self) -> None:
        """Give back threads and connections. Idempotent."""
        ...


class SoloGroup:
    """The group of one: nothing to add up, nobody to wait for."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        raise ValueError("a group of one rank has nobody to send to")

    def isend(self, tensor: torch.Tensor, to: int) -> Sending:
        raise ValueError("a group of one rank has nobody to send to")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> torch.Tensor:
        raise ValueError("a group of one rank has nobody to receive from")

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ParallelGroups:
    """The groups that one rank belongs to."""

    tensor: Group
    pipeline: Group
    expert: Group  # among whose ranks the experts of a layer are dealt out; of one rank, if each holds a part of all

    @classmethod
    def solo(cls) -> ParallelGroups:
        return cls(SoloGroup(), SoloGroup(), SoloGroup())

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    def close(self) -> None:
        for group in (self.tensor, self.pipeline, self.expert):
            group.close()
