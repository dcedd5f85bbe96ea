"""The executor with one rank, in this process.

Its rank may still have company: those of other replicas, if they share experts.

vLLM: `vllm/v1/executor/uniproc_executor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.errors import EngineDeadError
from course_lib.executor.executor import FinishedStep, StepInFlight
from course_lib.executor.worker import Worker, meeting_place
from course_lib.parallel.group import ParallelGroups
from course_lib.runner.model_runner import ModelRunner


class UniProcExecutor:
    """Loads the model at construction."""

    max_concurrent_steps = 1

    def __init__(self, config: EngineConfig) -> None:
        self.worker: Worker | None = Worker(config, self._join(config))
        self.worker.load_model()

    def _join(self, config: EngineConfig) -> ParallelGroups | None:
        place = config.parallel.replica
        if place is None or not config.parallel.in_lock_step:
            return None
        device = torch.device(config.device, place.local_rank) if config.device == "cuda" else torch.device("cpu")
        return meeting_place(config.parallel, place.host, place.port).join(0, device)

    @property
    def runner(self) -> ModelRunner:
        """This process's runner, for looking inside."""
        self.check_health()
        return self.worker.runner

    def determine_num_blocks(self) -> int:
        """How many KV blocks the device has room for now that the weights are there."""
        self.check_health()
        return self.worker.determine_num_blocks()

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self.check_health()
        self.worker.initialize_cache(num_blocks)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step may be launched while another is in flight."""
        return self.runner.can_run_ahead

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        return self.runner.execute_model(scheduled)

    def submit(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Run one step, or only launch it if it can be."""
        return self.launch_model(scheduled) if self.can_run_ahead else FinishedStep(self.execute_model(scheduled))

    def launch_model(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Start one step; its `result()` waits for the output."""
        return self.runner.launch(scheduled)

    def reset(self) -> None:
        """Forget all requests after an interrupted step."""
        if self.worker is not None:
            self.worker.reset()

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call `method` (a name, or a function that gets the runner first) on the one runner."""
        self.check_health()
        return [self.worker.call_runner(method, args, kwargs or {})]

    def check_health(self) -> None:
        if self.worker is None:
            raise EngineDeadError("the engine was shut down: make a new one")

    def shutdown(self) -> None:
        """Let go of the model and the cache."""
        if self.worker is not None:
            self.worker.close()
            self.worker = None
