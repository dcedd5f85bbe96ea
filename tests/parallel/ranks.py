"""Ranks for tests: threads of this process that talk over gloo, or ranks that hold their part and talk to nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from course_lib.parallel.group import ParallelGroups, SoloGroup
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.torch_group import connect

T = TypeVar("T")


def run_ranks(
    layout: ParallelLayout,
    work: Callable[[ParallelGroups], T],
    *,
    time_limit_s: float = 30,
    deal_experts: bool = False,
) -> list[T]:
    """`work` on every rank of `layout`, each a thread with groups of its own; results by rank, or the first error."""
    store = dist.HashStore()
    results: list[T] = [None] * layout.world_size
    errors: list[BaseException] = []
    # Whoever leaves while others are still connecting breaks their connections.
    all_connected = threading.Barrier(layout.world_size, timeout=time_limit_s)

    def run(rank: int) -> None:
        try:
            groups = connect(
                layout, rank, store, torch.device("cpu"), deal_experts=deal_experts, time_limit_s=time_limit_s
            )
            try:
                all_connected.wait()
                results[rank] = work(groups)
            finally:
                groups.close()
        except threading.BrokenBarrierError:  # because of another rank's error
            pass
        except BaseException as error:  # reported by the test's thread
            errors.append(error)
            all_connected.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(layout.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class SilentGroup(SoloGroup):
    """Rank `rank` of `size` as far as holding a part goes; its collectives reach nobody."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def silent_ranks(layout: ParallelLayout) -> list[ParallelGroups]:
    """The groups of every rank, in order: enough to build models and load them."""
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    return [
        ParallelGroups(
            SilentGroup(place.tensor, layout.tensor), SilentGroup(place.pipeline, layout.pipeline), SoloGroup()
        )
        for place in places
    ]
