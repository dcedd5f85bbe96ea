"""What executors whose ranks are other processes have in common: calls of all workers' methods, and how they end.

A call goes to every rank; who answers is part of it: all, or for a step only tensor rank 0 of the last stage, or
nobody. Subclasses carry calls and answers.

Invariants: every rank is sent the same calls in the same order; once a rank is lost, all are ended, and the executor
only repeats why.

vLLM: `vllm/v1/executor/abstract.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from course_lib.config import EngineConfig
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.errors import EngineDeadError, WorkerDiedError
from course_lib.executor.blame import Witness, describe, find_culprits
from course_lib.executor.executor import StepInFlight
from course_lib.executor.portable import Failure, pack
from course_lib.parallel.config import STEP_TIME_LIMIT, ParallelConfig

_STARTING = ("start", "load_model", "determine_num_blocks", "initialize_cache")


@dataclass(eq=False, slots=True, weakref_slot=True)
class Call:
    """A method call on its way to all ranks, and what has come back."""

    executor: RemoteExecutor
    method: str
    activity: str  # for error messages
    answering: Sequence[int]
    answers: dict[int, Any] = field(default_factory=dict)  # rank -> value or Failure

    @property
    def is_answered(self) -> bool:
        return all(rank in self.answers for rank in self.answering)

    @property
    def failures(self) -> list[tuple[int, Failure]]:
        return [(rank, value) for rank, value in self.answers.items() if isinstance(value, Failure)]

    def time_limit_s(self) -> float | None:
        """How long the ranks may be silent: steps are short, and so is what is left of a call that has failed on one
        rank; anything else may take its time."""
        return self.executor.step_time_limit_s if self.method == "execute_model" or self.failures else None

    def result(self) -> Any:
        """Wait for the one answer."""
        (answer,) = self.executor.wait_for(self)
        return answer


class RemoteExecutor(ABC):
    """The engine's side of an executor; see `executor.Executor`."""

    can_run_ahead = False

    def __init__(self, config: EngineConfig) -> None:
        parallel = config.parallel
        self.max_concurrent_steps = parallel.layout.pipeline
        self.step_time_limit_s = parallel.step_time_limit_s
        self._ranks = range(parallel.ranks_per_replica)
        self._output_rank = (parallel.layout.pipeline - 1) * parallel.layout.tensor
        self._num_steps = 0
        self._end: EngineDeadError | None = None  # why nothing more can be done

    # ---- what the engine calls ------------------------------------------------------------------

    def determine_num_blocks(self) -> int:
        """How many KV blocks every rank has room for."""
        return min(self._call_all("determine_num_blocks"))

    def initialize_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache on every rank."""
        self._call_all("initialize_cache", num_blocks)

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        return self.submit(scheduled).result()

    def submit(self, scheduled: SchedulerOutput) -> StepInFlight:
        """Send a step to all ranks and return."""
        self._num_steps += 1
        return self._send("execute_model", (scheduled,), [self._output_rank], f"step {self._num_steps}")

    def launch_model(self, scheduled: SchedulerOutput) -> StepInFlight:
        return self.submit(scheduled)

    def reset(self) -> None:
        """Have all ranks forget all requests, after the steps that they were sent."""
        if self._end is None:
            self._send("reset", (), [], "reset")

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call `method` (a name, or a function that gets the runner first) on every rank's runner.

        Raises ValueError if a function or an argument cannot be sent; else what the first failing rank raised.
        """
        packed = pack((method, args, kwargs or {}), "collective_rpc")
        return self.wait_for(self._send("call_runner", packed, self._ranks, f"collective_rpc({method!r})"))

    def check_health(self) -> None:
        """Raise EngineDeadError if a rank is lost."""
        if self._end is not None:
            raise self._end.with_traceback(None)

    def shutdown(self) -> None:
        """End all ranks. Idempotent."""
        self._end = self._end or EngineDeadError("the engine was shut down: make a new one")
        self._end_ranks()

    # ---- calls and answers ----------------------------------------------------------------------

    def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self.wait_for(self._send(method, arguments, self._ranks, method))

    def _send(self, method: str, arguments: tuple | bytes, answering: Sequence[int], activity: str) -> Call:
        """Send a call to all ranks; `arguments` may be pickled, and is unpickled then within the call."""
        if self._end is not None:
            raise self._end.with_traceback(None)
        call = Call(self, method, activity, answering)
        self._dispatch(call, arguments)
        return call

    def wait_for(self, call: Call) -> list[Any]:
        """The answers to `call`, by rank. Raises what a rank raised, or WorkerDiedError."""
        if self._end is not None and not call.is_answered:
            raise self._end.with_traceback(None)
        self._gather(call)
        for rank, failure in call.failures:
            raise failure.error(self._title(rank))
        return [call.answers[rank] for rank in call.answering]

    def _lose(self, call: Call, witnesses: Sequence[Witness]) -> NoReturn:
        """A rank has failed, ended or hangs: find out which, end all, and say so."""
        culprits = find_culprits(witnesses)
        limit = f"{self.step_time_limit_s:g} s (environment variable {STEP_TIME_LIMIT})"
        self._end = WorkerDiedError(describe(culprits, call.activity, limit))
        self._kill_ranks()
        self.shutdown()
        failure = culprits[0].failure
        if failure is not None and call.method in _STARTING:
            raise failure.error(culprits[0].title)
        raise self._end

    @abstractmethod
    def _dispatch(self, call: Call, arguments: tuple | bytes) -> None:
        """Send a call to all ranks, or to none."""

    @abstractmethod
    def _gather(self, call: Call) -> None:
        """Wait until `call.is_answered`; `_lose` if that will not be."""

    @abstractmethod
    def _title(self, rank: int) -> str:
        """What a rank is called in an error message."""

    @abstractmethod
    def _kill_ranks(self) -> None:
        """End all ranks at once: there is nothing to be kept."""

    @abstractmethod
    def _end_ranks(self) -> None:
        """End all ranks, and give back what they and this executor hold. Idempotent."""


def worker_name(parallel: ParallelConfig, rank: int) -> str:
    """As vLLM calls them: "Worker_PP1_TP0", with the axes that have more than one rank."""
    pipeline, tensor = divmod(rank, parallel.layout.tensor)
    parts = ["Worker"]
    if parallel.replica is not None:
        parts.append(f"DP{parallel.replica.rank}")
    if parallel.layout.pipeline > 1:
        parts.append(f"PP{pipeline}")
    if parallel.layout.tensor > 1:
        parts.append(f"TP{tensor}")
    return "_".join(parts)
