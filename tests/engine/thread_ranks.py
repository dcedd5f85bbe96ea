"""The ranks of an engine as threads of one process: real workers over real collectives (gloo), cheap to make.

The groups are connected once per layout and outlive the engines that use them. What passes between engine and ranks
is pickled, as it would be between processes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.executor.worker import Worker
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.torch_group import connect

TIME_LIMIT_S = 30


class RankThreads:
    """One thread per rank of `layout`, and the groups of each."""

    def __init__(self, layout: ParallelLayout) -> None:
        self.layout = layout
        self._threads = [ThreadPoolExecutor(1, f"rank{rank}") for rank in range(layout.world_size)]
        store, device = dist.HashStore(), torch.device("cpu")
        self.groups: list[ParallelGroups] = self.results(
            self.start(lambda rank: connect(layout, rank, store, device, time_limit_s=TIME_LIMIT_S))
        )

    def start(self, work: Callable[[int], Any]) -> list[Future]:
        """Have every rank do `work(rank)` after what it was given before."""
        return [thread.submit(work, rank) for rank, thread in enumerate(self._threads)]

    def results(self, started: list[Future]) -> list[Any]:
        """By rank, or the first error."""
        return [future.result(timeout=2 * TIME_LIMIT_S) for future in started]

    def close(self) -> None:
        self.results(self.start(lambda rank: self.groups[rank].close()))
        for thread in self._threads:
            thread.shutdown()


class ThreadedExecutor:
    """An executor whose ranks are `ranks`; as many steps in flight as stages."""

    can_run_ahead = False

    def __init__(self, config: EngineConfig, ranks: RankThreads) -> None:
        assert config.parallel.layout == ranks.layout
        self.ranks = ranks
        self.max_concurrent_steps = ranks.layout.pipeline
        self.most_in_flight = 0
        self._in_flight: list[ThreadedStep] = []
        self.workers = self._call(lambda rank: Worker(config, ranks.groups[rank]))
        self._call(lambda rank: self.workers[rank].load_model())

    def _call(self, work: Callable[[int], Any]) -> list[Any]:
        return self.ranks.results(self.ranks.start(work))

    def determine_num_blocks(self) -> int:
        return min(self._call(lambda rank: self.workers[rank].determine_num_blocks()))

    def initialize_cache(self, num_blocks: int) -> None:
        self._call(lambda rank: self.workers[rank].initialize_cache(num_blocks))

    def submit(self, scheduled: SchedulerOutput) -> ThreadedStep:
        message = pickle.dumps(scheduled)
        started = self.ranks.start(lambda rank: self.workers[rank].execute_model(pickle.loads(message)))
        step = ThreadedStep(self, started)
        self._in_flight.append(step)
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        return step

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        return self.submit(scheduled).result()

    def read(self, step: ThreadedStep) -> ModelRunnerOutput:
        """The step's output, which every rank of the last stage must give alike."""
        assert self._in_flight.pop(0) is step, "results are read in the order of the steps"
        outputs = self.ranks.results(step.started)
        last = (self.ranks.layout.pipeline - 1) * self.ranks.layout.tensor
        assert all(output is None or not output.request_ids for output in outputs[:last])
        for rank, output in enumerate(outputs[last:], last):
            assert output == outputs[last], f"rank {rank} sampled something else than rank {last}"
        return pickle.loads(pickle.dumps(outputs[last]))

    def reset(self) -> None:
        """What is in flight is executed, and its output dropped."""
        for step in self._in_flight:
            self.ranks.results(step.started)
        self._in_flight.clear()
        self._call(lambda rank: self.workers[rank].reset())

    def shutdown(self) -> None:
        """The groups stay, for the next engine."""
        self.workers = []


@dataclass
class ThreadedStep:
    executor: ThreadedExecutor
    started: list[Future] = field(repr=False)

    def result(self) -> ModelRunnerOutput:
        return self.executor.read(self)
