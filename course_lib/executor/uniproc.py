"""The executor with one runner, in this process.

An executor hides where runners live. Later ones start worker processes, join a torchrun group or
place Ray actors; the engine talks to all of them through these methods.

vLLM: `vllm/v1/executor/uniproc_executor.py`, `abstract.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.runner.cache_size import decide_num_blocks
from course_lib.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from course_lib.runner.gpu_model_runner import StepInFlight


def make_runner(config: EngineConfig) -> ModelRunner:
    """The runner for the configured device."""
    if config.device == "cuda":
        from course_lib.runner.gpu_model_runner import GpuModelRunner

        return GpuModelRunner(config)
    return ModelRunner(config)


class UniProcExecutor:
    """Loads the model at construction."""

    def __init__(self, config: EngineConfig) -> None:
        self.runner = make_runner(config)
        self.runner.load_model()

    def determine_num_blocks(self) -> int:
        """How many KV blocks the device has room for now that the weights are there."""
        return decide_num_blocks(self.runner)

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self.runner.initialize_cache(num_blocks)
        self.runner.warm_up()

    @property
    def can_run_ahead(self) -> bool:
        """Whether `launch_model` exists: a step may be launched while another is in flight."""
        return self.runner.can_run_ahead

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        return self.runner.execute_model(scheduled)

    def launch_model(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Start one step; its `result()` waits for the output."""
        return self.runner.launch(scheduled)

    def reset(self) -> None:
        """Forget all requests after an interrupted step."""
        self.runner.reset()

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call `method` (a name, or a function that gets the runner first) on every runner."""
        if callable(method):
            return [method(self.runner, *args, **(kwargs or {}))]
        target = getattr(self.runner, method, None)
        if target is None:
            raise ValueError(f"collective_rpc: the model runner has no method {method!r}")
        return [target(*args, **(kwargs or {}))]
