"""The inner loop: schedule, execute, update. Knows tokens, never text.

Owns the scheduler and the executor, and the queue of steps in flight: launched, their results not read. Results
are read in the order of the launches. A step that is interrupted half-way (Ctrl-C in a notebook, an error in
the model) leaves tokens counted that were never computed, so both sides are then emptied: the requests in
flight are lost, the engine is not.

vLLM: `vllm/v1/engine/core.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from course_lib.config import EngineConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.kv_events import KVEventFeed, KVListener
from course_lib.core.messages import EngineCoreOutput, ModelRunnerOutput, SchedulerOutput
from course_lib.core.request import Request
from course_lib.core.scheduler import Scheduler
from course_lib.executor.executor import StepInFlight, make_executor

logger = logging.getLogger(__name__)


class EngineCore:
    """Loads the model and allocates the cache at construction.

    Attributes:
        config: final; `max_model_len` may be lower than asked for if it was left to the engine.
        last_scheduled: the plan of the step that `step` last reported, for statistics.

    Steps overlap in one of two ways. On a GPU a step is launched before the previous one's tokens are fetched: the
    device computes it while the host reports those tokens. In a pipeline of P stages P steps are in flight, of
    different requests, one in each stage. `step` tops the queue up again before it returns, so the stages work
    while the caller turns tokens into text. When a step leaves no request behind, nothing is left in flight.
    Replicas that share experts (`in_lock_step`) overlap nothing: there a step is one forward pass, to be counted.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.executor = make_executor(config)
        # Also when the engine is forgotten, and when Python ends: worker processes must not outlive it.
        self._end_executor = weakref.finalize(self, self.executor.shutdown)
        self.last_scheduled: SchedulerOutput | None = None
        self._in_flight: deque[tuple[SchedulerOutput, StepInFlight]] = deque()
        self._kv_events = KVEventFeed()
        self._overlaps = not config.parallel.in_lock_step
        try:
            self.num_blocks = self.executor.determine_num_blocks()
            self.config = fit_to_cache(config, self.num_blocks)
            self.executor.initialize_cache(self.num_blocks)
        except BaseException:
            self.shutdown()
            raise
        self._start_scheduler()

    def _start_scheduler(self) -> None:
        cache = self.config.cache
        kv_cache = KVCacheManager(self.num_blocks, cache.block_size, cache.enable_prefix_caching)
        steps = self.executor.max_concurrent_steps
        self.scheduler = Scheduler(
            self.config.scheduler, kv_cache, steps if self._overlaps else 1,
            tells_tokens=self.config.parallel.layout.pipeline > 1,
        )  # fmt: skip
        self._kv_events.follow(kv_cache.pool)

    def add_request(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests wherever they are; unknown ids are passed over."""
        self.scheduler.finish_requests(request_ids)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[EngineCoreOutput]:
        """Run one step. After any exception the engine is empty and usable."""
        if not self.has_work:
            return []
        try:
            news = self.scheduler.update_from_output(self._next_output())
            if self._in_pipeline:
                self._fill_pipeline()  # with the requests whose tokens have just come
            while self._in_flight and not self.scheduler.requests:
                _, step = self._in_flight.popleft()  # all have ended: what it computes is wanted by nobody
                self.scheduler.update_from_output(step.result())
            if self.config.debug:
                self.scheduler.check_invariants()
            self._kv_events.publish()
            return news
        except BaseException:
            self.reset()
            raise

    def _plan(self) -> SchedulerOutput:
        scheduled = self.scheduler.schedule()
        if self.config.debug:
            self.scheduler.check_invariants(scheduled)
        return scheduled

    def _next_output(self) -> ModelRunnerOutput:
        """The output of the next step, others being launched meanwhile if that can be."""
        if self._in_pipeline:
            self._fill_pipeline()
        elif not self._in_flight and self._overlaps and self.executor.can_run_ahead:
            scheduled = self._plan()
            self._in_flight.append((scheduled, self.executor.launch_model(scheduled)))
        elif not self._in_flight:
            scheduled = self.last_scheduled = self._plan()
            return self.executor.execute_model(scheduled)
        self.last_scheduled, step = self._in_flight.popleft()
        if self.executor.can_run_ahead:
            self._launch_ahead()
        return step.result()

    def _launch_ahead(self) -> None:
        """Launch the step behind the one in flight, unless it needs that one's tokens."""
        scheduled = self.scheduler.schedule_ahead()
        if scheduled is not None:
            self._in_flight.append((scheduled, self.executor.launch_model(scheduled)))

    @property
    def _in_pipeline(self) -> bool:
        return self._overlaps and self.executor.max_concurrent_steps > 1

    def _fill_pipeline(self) -> None:
        """Launch steps until the queue is full, or nobody can be served before a result is read."""
        while len(self._in_flight) < self.executor.max_concurrent_steps and self.scheduler.has_work:
            scheduled = self._plan()
            if scheduled.is_empty:
                return
            self._in_flight.append((scheduled, self.executor.submit(scheduled)))

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        """Call a method of every rank's model runner, or a function that is given the runner; results by rank."""
        return self.executor.collective_rpc(method, args, kwargs)

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests hold blocks."""
        done = self.scheduler.reset_prefix_cache()
        self._kv_events.publish()
        return done

    def subscribe_kv_events(self, listener: KVListener) -> Callable[[], None]:
        """Have `listener` called, in the thread that steps, with what happened to the prefix cache in each step.

        The cache is emptied first, so that the events tell everything. Returns a function that ends it.

        Raises:
            ValueError: this engine caches nothing.
            RuntimeError: requests hold blocks.
        """
        if not self.config.cache.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=False: there are no KV events; construct the engine with True")
        if not self.reset_prefix_cache():
            raise RuntimeError(
                "KV events can only be told from an empty cache on: subscribe before the first request, or when none "
                "is unfinished"
            )
        return self._kv_events.subscribe(listener)

    def reset(self) -> None:
        """Drop all requests, all cached prefixes and what is in flight."""
        self._in_flight.clear()
        self._start_scheduler()
        self.executor.reset()

    def shutdown(self) -> None:
        """End the executor and its processes; nothing can be run afterwards. Idempotent."""
        self._in_flight.clear()
        self._end_executor()


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
        layout = config.parallel.layout
        bytes_per_token = config.model.kv_bytes_per_token_per_rank(layout)
        each = " on each rank" if layout.tensor * layout.pipeline > 1 else ""
        shorter = f"set max_model_len to at most {capacity}, or " if capacity >= 2 else ""
        more = " or gpu_memory_utilization" if config.device == "cuda" else ""
        raise ValueError(
            f"the KV cache has {num_blocks} blocks of {size} tokens, too few for one request of "
            f"max_model_len={wanted} ({needed} blocks, "
            f"{needed * size * bytes_per_token / 2**20:.0f} MiB{each}): {shorter}"
            f"raise kv_cache_memory_bytes, num_gpu_blocks_override{more}"
        )
    logger.warning("max_model_len lowered from %d to %d tokens, which is what the KV cache holds", wanted, capacity)
    return with_max_model_len(config, capacity)


def with_max_model_len(config: EngineConfig, max_model_len: int) -> EngineConfig:
    """`config` for sequences of at most so many tokens."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, max_model_len=max_model_len),
        scheduler=dataclasses.replace(config.scheduler, max_model_len=max_model_len),
    )
