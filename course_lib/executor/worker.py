"""One rank: its groups and its runner. What every executor has one of, wherever it puts it.

Invariant: the ranks of an engine have their workers' methods called in the same order; in several of them, they wait
for each other.

vLLM: `vllm/v1/worker/gpu_worker.py`, `worker_base.py`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.torch_group import connect, open_store
from course_lib.runner.cache_size import decide_num_blocks
from course_lib.runner.model_runner import ModelRunner


def make_runner(config: EngineConfig, groups: ParallelGroups) -> ModelRunner:
    """The runner for the configured device."""
    if config.device == "cuda":
        from course_lib.runner.gpu_model_runner import GpuModelRunner

        return GpuModelRunner(config, groups)
    return ModelRunner(config, groups)


def own_address(host: str, port: int) -> str:
    """This machine's address on the network through which it reaches `host`. Sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


@dataclass(frozen=True)
class MeetingPlace:
    """Where the ranks of `layout`, a world, find each other: a TCPStore that somebody serves."""

    layout: ParallelLayout
    first_rank: int  # in the world: the number of this engine's rank 0
    host: str
    port: int
    time_limit_s: float  # for one collective
    deal_experts: bool  # among the ranks: whole ones for each, instead of a part of all

    def join(self, rank: int, device: torch.device) -> ParallelGroups:
        """Meet the others as this engine's rank `rank`."""
        store = open_store(self.host, self.port, serve=False)
        # The others reach this process where it reaches the store from.
        own = own_address(self.host, self.port)
        return connect(
            self.layout, self.first_rank + rank, store, device,
            deal_experts=self.deal_experts, host=own, time_limit_s=self.time_limit_s,
        )  # fmt: skip


def meeting_place(parallel: ParallelConfig, host: str, port: int) -> MeetingPlace:
    """The meeting place of an engine's ranks: with those of the other replicas, or at (host, port) by themselves."""
    # Whoever waits for the workers decides when a rank hangs, and says which; this is for when nobody waits any more.
    limit = 2 * parallel.step_time_limit_s
    place, layout = parallel.replica, parallel.layout
    if parallel.in_lock_step and place is not None:
        return MeetingPlace(layout, layout.rank(data=place.rank), place.host, place.port, limit, deal_experts=True)
    own_ranks = ParallelLayout(layout.tensor, layout.pipeline)
    return MeetingPlace(own_ranks, 0, host, port, limit, deal_experts=parallel.enable_expert_parallel)


class Worker:
    """Reads no weights yet: `load_model` does.

    Args:
        groups: of this rank; None if it is the only one.
    """

    def __init__(self, config: EngineConfig, groups: ParallelGroups | None = None) -> None:
        self.groups = groups or ParallelGroups.solo()
        self.runner = make_runner(config, self.groups)

    def load_model(self) -> None:
        """Read this rank's weights."""
        self.runner.load_model()

    def determine_num_blocks(self) -> int:
        """How many KV blocks this rank's device has room for now that the weights are there."""
        return decide_num_blocks(self.runner)

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, and do what else is better done before the first request."""
        self.runner.initialize_cache(num_blocks)
        self.runner.warm_up()

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput | None:
        """Run one step. Returns its output on the last stage of the pipeline, otherwise None."""
        return self.runner.execute_model(scheduled)

    def reset(self) -> None:
        """Forget all requests."""
        self.runner.reset()

    def call_runner(self, method: str | Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call `method`: a name of the runner's, or a function that is given the runner first."""
        if callable(method):
            return method(self.runner, *args, **kwargs)
        target = getattr(self.runner, method, None)
        if target is None:
            raise ValueError(f"collective_rpc: the model runner has no method {method!r}")
        return target(*args, **kwargs)

    def close(self) -> None:
        """Give back connections."""
        self.groups.close()
