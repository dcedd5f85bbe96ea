"""What an engine asks of its executor, wherever the model runners live; and the choice of one.

Owns no state. The engine calls `determine_num_blocks` and `initialize_cache` once, in this order, then steps.
Invariant for all executors: steps are executed in the order in which they were handed over, on every rank.

vLLM: `vllm/v1/executor/abstract.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput


class StepInFlight(Protocol):
    """A step that was handed over."""

    def result(self) -> ModelRunnerOutput:
        """Wait for its output. Call it once, and in the order of the steps."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that was over when it was handed over."""

    output: ModelRunnerOutput

    def result(self) -> ModelRunnerOutput:
        return self.output


class Executor(Protocol):
    """Runs the steps of one engine on one or several ranks. Used by one thread at a time, except for `check_health`.

    Raises EngineDeadError from every method but `reset` and `shutdown` once a rank is lost: WorkerDiedError at first.
    """

    max_concurrent_steps: int  # how many may be in flight through `submit`: the stages of the pipeline

    @property
    def can_run_ahead(self) -> bool:
        """Whether `launch_model` may be called while one other step is in flight."""
        ...

    def determine_num_blocks(self) -> int:
        """How many KV blocks every rank has room for: the least of all."""
        ...

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache on every rank, and do what else is better done before the first request."""
        ...

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        ...

    def submit(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Hand over one step, to run beside those before it in a pipeline."""
        ...

    def launch_model(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Start one step on devices that compute while the host does something else; see `can_run_ahead`."""
        ...

    def reset(self) -> None:
        """Forget all requests and the steps in flight, after an interrupted step. Nothing once a rank is lost."""
        ...

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call `method` (a name, or a function that is given the runner first) on every rank's runner.

        Returns the results by rank. Raises what the first failing rank raised.
        """
        ...

    def check_health(self) -> None:
        """Raise EngineDeadError if a rank is lost or the executor was shut down."""
        ...

    def shutdown(self) -> None:
        """End all ranks and give back what they held. Idempotent."""
        ...


def make_executor(config: EngineConfig) -> Executor:
    """The executor that `config.parallel.backend` names, its model loaded.

    Raises:
        CourseError, ValueError: what a rank could not do at its start, as that rank raised it.
        WorkerDiedError: a rank has ended without saying why.
    """
    backend = config.parallel.backend
    if backend == "mp":
        from course_lib.executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(config)
    if backend == "ray":
        from course_lib.executor.ray_executor import RayExecutor

        return RayExecutor(config)
    if backend == "external_launcher":
        from course_lib.executor.external_launcher import ExternalLauncherExecutor

        return ExternalLauncherExecutor(config)
    from course_lib.executor.uniproc import UniProcExecutor

    return UniProcExecutor(config)
