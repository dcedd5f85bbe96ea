"""Which rank does what: plain arithmetic, no processes.

World ranks are laid out data x pipeline x tensor, tensor fastest: the ranks that talk most, those of a tensor group,
are neighbours, as GPUs of one machine are. vLLM: `initialize_model_parallel` in `vllm/distributed/parallel_state.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class Coordinates(NamedTuple):
    """A rank's place along each axis."""

    data: int
    pipeline: int
    tensor: int


@dataclass(frozen=True)
class ParallelLayout:
    """How many ranks lie along each axis; world rank = (data * P + pipeline) * T + tensor."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` is."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not one of the {self.world_size} ranks of {self}")
        rest, tensor = divmod(rank, self.tensor)
        data, pipeline = divmod(rest, self.pipeline)
        return Coordinates(data, pipeline, tensor)

    def rank(self, data: int = 0, pipeline: int = 0, tensor: int = 0) -> int:
        """The rank at these coordinates."""
        return (data * self.pipeline + pipeline) * self.tensor + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that hold slices of the same layers: neighbours."""
        return [
            [self.rank(d, p, t) for t in range(self.tensor)]
            for d in range(self.data)
            for p in range(self.pipeline)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that hold the same slice of successive layers, first stage first: `tensor` apart."""
        return [
            [self.rank(d, p, t) for p in range(self.pipeline)]
            for d in range(self.data)
            for t in range(self.tensor)
        ]

    def expert_groups(self) -> list[list[int]]:
        """Ranks among which the experts of one layer are dealt out: all of one pipeline stage."""
        return [
            [self.rank(d, p, t) for d in range(self.data) for t in range(self.tensor)]
            for p in range(self.pipeline)
        ]


def split_evenly(count: int, parts: int) -> list[range]:
    """`range(count)` cut into `parts` runs of lengths that differ by at most one, the longer ones first."""
    size, longer = divmod(count, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(starts)]
