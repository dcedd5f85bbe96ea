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

from course_lib.config import EngineConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import EngineCoreOutput, SchedulerOutput
from course_lib.core.request import Request
from course_lib.core.scheduler import Scheduler
from course_lib.executor.uniproc import UniProcExecutor

logger = logging.getLogger(__name__)


class EngineCore:
    """Loads the model and allocates the cache at construction.

    Attributes:
        config: final; `max_model_len` may be lower than asked for if it was left to the engine.
        last_scheduled: the newest step's plan, for statistics.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.executor = UniProcExecutor(config)
        self.num_blocks = self.executor.determine_num_blocks()
        self.config = fit_to_cache(config, self.num_blocks)
        self.executor.initialize_cache(self.num_blocks)
        self.last_scheduled: SchedulerOutput | None = None
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
        return self.scheduler.has_work

    def step(self) -> list[EngineCoreOutput]:
        """Run one step. After any exception the engine is empty and usable."""
        if not self.scheduler.has_work:
            return []
        try:
            scheduled = self.last_scheduled = self.scheduler.schedule()
            if self.config.debug:
                self.scheduler.check_invariants(scheduled)
            output = self.executor.execute_model(scheduled)
            news = self.scheduler.update_from_output(output)
            if self.config.debug:
                self.scheduler.check_invariants()
            return news
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Drop all requests and all cached prefixes."""
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
