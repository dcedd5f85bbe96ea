"""A pipeline in one process: real runners, one per stage, that each take their time.

Every stage executes the steps in order, but how far each has come when the next step is planned is random, so that
plans meet every mixture of steps that were executed, half executed and not yet begun. What passes between engine and
stages is pickled, as it would be between processes.
"""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.parallel.group import ParallelGroups, SoloGroup
from course_lib.runner.model_runner import ModelRunner


class QueueGroup(SoloGroup):
    """Stages in one process: what is sent lies in a queue until it is received."""

    def __init__(self, rank: int, size: int, links: dict[int, deque[torch.Tensor]]) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._links = links  # by receiver

    def isend(self, tensor: torch.Tensor, to: int) -> Any:
        assert to == self.rank + 1
        self._links[to].append(tensor)
        return _Gone()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> torch.Tensor:
        assert source == self.rank - 1
        tensor = self._links[self.rank].popleft()
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype
        return tensor


class _Gone:
    def wait(self) -> None:
        pass


@dataclass
class Stage:
    """A runner and the steps that it has not executed yet."""

    runner: ModelRunner
    waiting: deque[bytes] = field(default_factory=deque)
    executed: int = 0

    def advance(self, number: int) -> list[ModelRunnerOutput | None]:
        """Execute steps until `number` have been."""
        outputs = []
        while self.executed < number:
            outputs.append(self.runner.execute_model(pickle.loads(self.waiting.popleft())))
            self.executed += 1
        return outputs


class FakePipeline:
    """An executor with `config.parallel.layout.pipeline` stages.

    Args:
        depth: steps in flight.
        seed: of the stages' pace.
    """

    can_run_ahead = False

    def __init__(self, config: EngineConfig, depth: int, seed: int) -> None:
        self.max_concurrent_steps = depth
        self.most_in_flight = 0
        self._random = random.Random(seed)
        self._submitted = self._read = 0
        self._outputs: deque[ModelRunnerOutput] = deque()
        size = config.parallel.layout.pipeline
        links: dict[int, deque[torch.Tensor]] = {rank: deque() for rank in range(size)}
        groups = [ParallelGroups(SoloGroup(), QueueGroup(rank, size, links), SoloGroup()) for rank in range(size)]
        self.stages = [Stage(ModelRunner(config, group)) for group in groups]
        for stage in self.stages:
            stage.runner.load_model()

    def determine_num_blocks(self) -> int:
        return self.stages[0].runner.config.cache.num_blocks_override

    def initialize_cache(self, num_blocks: int) -> None:
        for stage in self.stages:
            stage.runner.initialize_cache(num_blocks)

    def submit(self, scheduled: SchedulerOutput) -> FakeStep:
        message = pickle.dumps(scheduled)
        for stage in self.stages:
            stage.waiting.append(message)
        self._submitted += 1
        self.most_in_flight = max(self.most_in_flight, self._submitted - self._read)
        assert self._submitted - self._read <= self.max_concurrent_steps
        self._advance(lambda stage, before: self._random.randint(stage.executed, before))
        return FakeStep(self, self._submitted)

    def result(self, number: int) -> ModelRunnerOutput:
        """Let all stages execute step `number`, and some go on."""
        assert number == self._read + 1, "results are read in the order of the steps"
        self._read = number
        self._advance(lambda stage, before: self._random.randint(max(number, stage.executed), before))
        return self._outputs.popleft()

    def _advance(self, until: Callable[[Stage, int], int]) -> None:
        before = self._submitted
        for stage in self.stages:
            outputs = stage.advance(until(stage, before))
            before = stage.executed
            if stage is self.stages[-1]:
                self._outputs += pickle.loads(pickle.dumps(outputs))
            else:
                assert all(output is None or not output.request_ids for output in outputs)

    def reset(self) -> None:
        """As the executors of several processes: what is in flight is executed, and its output dropped."""
        self._advance(lambda stage, before: before)
        self._outputs.clear()
        self._read = self._submitted
        for stage in self.stages:
            stage.runner.reset()

    def shutdown(self) -> None:
        self.stages = []


@dataclass
class FakeStep:
    pipeline: FakePipeline
    number: int

    def result(self) -> ModelRunnerOutput:
        return self.pipeline.result(self.number)
