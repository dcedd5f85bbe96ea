"""Ranks without processes or threads: one function, run for each rank in turn.

A rank that comes to a collective needs what the others bring. So it is stopped there, the others run up to the same
place, the result is worked out, and all start again from the beginning with that result in hand. Slow for many
collectives, but exact, repeatable, and nothing can hang: ranks that do not come to the same collective are told apart.

Invariant: the function is given a fresh group each time and must make everything else it changes anew.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from course_lib.parallel.group import Traffic

T = TypeVar("T")
MOST_COLLECTIVES = 50


class OutOfStepError(RuntimeError):
    """The ranks came to different collectives: real ones would wait for each other for ever."""


class _Waiting(BaseException):
    """This rank has come to a collective whose result is not known yet. No `Exception`, so that nobody catches it."""


class TurnGroup:
    """The part of `course_lib.parallel.group.Group` that exercises use. `traffic` counts as the engine's groups do;
    pickled objects are in `gather_bytes`."""

    def __init__(self, rank: int, size: int, settled: list[tuple[str, Any]]) -> None:
        self.rank, self.size, self.traffic = rank, size, Traffic()
        self.brought: tuple[str, Any] = ("nothing", None)
        self._settled = iter(settled)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.traffic.all_reduce_calls += 1
        self.traffic.all_reduce_bytes += tensor.nbytes
        return self._meet(f"all_reduce of {list(tensor.shape)}", tensor)

    def all_gather(self, tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        self.traffic.gather_calls += 1
        self.traffic.gather_bytes += tensor.nbytes
        return self._meet(f"all_gather of {list(tensor.shape)} along {dim}", (tensor, dim))

    def all_gather_object(self, value: Any) -> list[Any]:
        self.traffic.gather_calls += 1
        self.traffic.gather_bytes += len(pickle.dumps(value))
        return self._meet("all_gather_object", value)

    def _meet(self, what: str, value: Any) -> Any:
        for known, result in self._settled:
            if known != what:
                raise OutOfStepError(f"rank {self.rank} calls {what} where it called {known} before")
            return copy.deepcopy(result)
        self.brought = (what, copy.deepcopy(value))
        raise _Waiting


def in_turns(size: int, work: Callable[[TurnGroup], T]) -> list[T]:
    """`work(group)` on each of `size` ranks; results by rank.

    Raises OutOfStepError, and whatever `work` raises.
    """
    settled: list[tuple[str, Any]] = []
    while len(settled) <= MOST_COLLECTIVES:
        results, brought = [], []
        for rank in range(size):
            group = TurnGroup(rank, size, settled)
            try:
                results.append(work(group))
            except _Waiting:
                pass
            brought.append(group.brought)
        kinds = [what for what, _ in brought]
        if len(results) == size:
            return results
        if len(set(kinds)) > 1:
            other = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
            first, second = (kinds[rank].replace("nothing", "no further collective") for rank in (0, other))
            fate = "wait here for ever" if "nothing" in (kinds[0], kinds[other]) else "fail here, or wait for ever"
            raise OutOfStepError(f"rank 0 comes to {first}, rank {other} to {second}: real ranks would {fate}")
        settled.append((kinds[0], _settle(kinds[0], [value for _, value in brought])))
    raise OutOfStepError(f"more than {MOST_COLLECTIVES} collectives, and no end")


def _settle(what: str, values: list[Any]) -> Any:
    if what.startswith("all_reduce"):
        return torch.stack(values).sum(dim=0)
    if what == "all_gather_object":
        return values
    return torch.cat([tensor for tensor, _ in values], dim=values[0][1])
