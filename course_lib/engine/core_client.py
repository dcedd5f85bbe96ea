"""What `LLMEngine` and `AsyncLLM` see of the engine core, wherever it runs.

One replica is an `EngineCore` in this process, stepped by its caller: nothing lies in between. Several replicas are
cores in processes of their own (`replicated_core`) that step by themselves; `step` then waits for what they send.

vLLM: `EngineCoreClient` in `vllm/v1/engine/core_client.py`, whose `InprocClient` is the first kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from course_lib.config import EngineConfig
from course_lib.core.kv_events import KVListener
from course_lib.core.messages import EngineCoreOutput
from course_lib.core.request import Request
from course_lib.engine.core import EngineCore
from course_lib.engine.stat_logger import StatLogger, StepStats


class CoreClient(Protocol):
    """Requests in, tokens out. Used from one thread; only `wake` and `check_health` may be called from others.

    Attributes:
        config: final.
    """

    config: EngineConfig

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises EngineDeadError if nothing is left to serve it."""
        ...

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests wherever they are; unknown ids are passed over."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to wait for."""
        ...

    def step(self) -> list[EngineCoreOutput]:
        """What the next step has produced. After an exception no request is left.

        Raises EngineDeadError if nothing is left to serve the requests.
        """
        ...

    def anybody_unfinished(self, we: bool) -> bool:
        """Whether `step` must be called: `we` have requests, or somebody has who cannot step without us."""
        ...

    def wake(self) -> None:
        """Make a `step` that waits return, in whatever thread, because there is something else to do."""
        ...

    def check_health(self) -> None:
        """Raise EngineDeadError if a process is gone without which nothing can be served."""
        ...

    def reset(self) -> None:
        """Drop all requests and all cached prefixes."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests hold blocks."""
        ...

    def subscribe_kv_events(self, listener: KVListener) -> Callable[[], None]:
        """See `EngineCore.subscribe_kv_events`."""
        ...

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call a method of every rank's runner, or a function that is given the runner; results by rank."""
        ...

    def shutdown(self) -> None:
        """End all processes and threads; nothing can be run afterwards. Idempotent."""
        ...


class InProcessCore(EngineCore):
    """The core itself, with the rest of a client's surface."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._stat_logger = StatLogger() if config.log_stats else None

    def step(self) -> list[EngineCoreOutput]:
        news = super().step()
        if self._stat_logger is not None:
            self._stat_logger.record(StepStats.of(self), news)
        return news

    def anybody_unfinished(self, we: bool) -> bool:
        return we

    def wake(self) -> None:
        """A step of this core never waits for anybody."""

    def check_health(self) -> None:
        self.executor.check_health()


def make_core(config: EngineConfig) -> CoreClient:
    """The core or cores that the configuration asks for; the model is loaded when this returns."""
    parallel = config.parallel
    if parallel.replica is not None and parallel.in_lock_step:
        from course_lib.engine.joint_passes import LockStepCore

        return LockStepCore(config)
    # One of several replicas that were started by hand: on a GPU a process of its own sees to it that it has its own.
    alone_on_its_gpu = parallel.replica is not None and config.device == "cuda"
    if parallel.layout.data > 1 or alone_on_its_gpu:
        from course_lib.engine.replicated_core import ReplicatedCore

        return ReplicatedCore(config)
    return InProcessCore(config)
