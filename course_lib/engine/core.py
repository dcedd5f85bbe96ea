"""The inner loop: schedule, execute, update. Knows tokens, never text.

Owns the scheduler and the executor. A step that is interrupted half-way (Ctrl-C in a notebook, an
error in the model) leaves tokens counted that were never computed, so both sides are then emptied:
the requests in flight are lost, the engine is not.

vLLM: `vllm/v1/engine/core.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from course_lib.config import EngineConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from course_lib.core.request import Request
from course_lib.core.scheduler import Scheduler
from course_lib.executor.uniproc import UniProcExecutor

if TYPE_CHECKING:
    from course_lib.runner.gpu_model_runner import StepInFlight

logger = logging.getLogger(__name__)


class EngineCore:
    """Loads the model and allocates the cache at construction.

    Attributes:
        config: final; `max_model_len` may be lower than asked for if it was left to the engine.
        last_scheduled: the plan of the step that `step` last reported, for statistics.

    Where the executor can, a step is launched before the previous one's tokens are fetched: the device computes
    it while the host reports those tokens. Between calls of `step` at most that one step is in flight, and none
    when there are no requests.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.executor = UniProcExecutor(config)
        self.num_blocks = self.executor.determine_num_blocks()
        self.config = fit_to_cache(config, self.num_blocks)
        self.executor.initialize_cache(self.num_blocks)
        self.last_scheduled: SchedulerOutput | None = None
        self._in_flight: tuple[SchedulerOutput, StepInFlight] | None = None
        self._start_scheduler()

    def _start_scheduler(self) -> None:
        cache = self.config.cache
        kv_cache = KVCacheManager(self.num_blocks, cache.block_size, cache.enable_prefix_caching)
        self.scheduler = Scheduler(self.config.scheduler, kv_cache)

    def add_request(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests wherever they are; unknown ids are passed over."""
        self.scheduler.finish_requests(request_ids)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def step(self) -> list[EngineCoreOutput]:
        """Run one step. After any exception the engine is empty and usable."""
        if not self.has_work:
            return []
        try:
            # A step that is in flight is read first, also if no other may be launched ahead any more.
            ahead = self.executor.can_run_ahead or self._in_flight is not None
            output = self._run_ahead() if ahead else self.executor.execute_model(self._plan())
            news = self.scheduler.update_from_output(output)
            if self._in_flight is not None and not self.scheduler.requests:
                self._take_in_flight().result()  # all have ended: what it computes is wanted by nobody
            if self.config.debug:
                self.scheduler.check_invariants()
            return news
        except BaseException:
            self.reset()
            raise

    def _plan(self) -> SchedulerOutput:
        scheduled = self.last_scheduled = self.scheduler.schedule()
        if self.config.debug:
            self.scheduler.check_invariants(scheduled)
        return scheduled

    def _run_ahead(self) -> ModelRunnerOutput:
        """The next step's output, the step after it being launched first if it can be."""
        if self._in_flight is None:
            scheduled = self._plan()
            self._in_flight = scheduled, self.executor.launch_model(scheduled)
        step = self._take_in_flight()
        ahead = self.scheduler.schedule_ahead() if self.executor.can_run_ahead else None
        if ahead is not None:
            self._in_flight = ahead, self.executor.launch_model(ahead)
        return step.result()

    def _take_in_flight(self) -> StepInFlight:
        (self.last_scheduled, step), self._in_flight = self._in_flight, None
        return step

    def reset(self) -> None:
        """Drop all requests and all cached prefixes."""
        self._in_flight = None
        self._start_scheduler()
        self.executor.reset()


def fit_to_cache(config: EngineConfig, num_blocks: int) -> EngineConfig:
    """Make sure one request of full length fits the cache, or say what to do.

    A `max_model_len` that nobody asked for is lowered to what fits.

    Raises ValueError if the cache is too small for the length that was asked for.
    """
    size = config.cache.block_size
    capacity = num_blocks * size
    wanted = config.scheduler.max_model_len
    if capacity >= wanted:
        return config
    if not config.shrink_to_fit or capacity < 2:
        needed = -(-wanted // size)
        shorter = f"set max_model_len to at most {capacity}, or " if capacity >= 2 else ""
        more = " or gpu_memory_utilization" if config.device == "cuda" else ""
        raise ValueError(
            f"the KV cache has {num_blocks} blocks of {size} tokens, too few for one request of "
            f"max_model_len={wanted} ({needed} blocks, "
            f"{needed * size * config.model.kv_bytes_per_token / 2**20:.0f} MiB): {shorter}"
            f"raise kv_cache_memory_bytes, num_gpu_blocks_override{more}"
        )
    logger.warning("max_model_len lowered from %d to %d tokens, which is what the KV cache holds", wanted, capacity)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_model_len=capacity),
        scheduler=dataclasses.replace(config.scheduler, max_model_len=capacity),
    )
