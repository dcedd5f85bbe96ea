"""A line of statistics every few seconds, as servers print it.

vLLM: `vllm/v1/metrics/loggers.py` (`LoggingStatLogger`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from course_lib.core.messages import EngineCoreOutput

if TYPE_CHECKING:
    from course_lib.engine.core import EngineCore

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepStats:
    """What a core looks like after a step."""

    num_computed_tokens: int  # in this step
    num_running: int  # requests
    num_waiting: int
    cache_usage: float  # 0 to 1
    recent_hit_rate: float  # 0 to 1
    num_evictions: int  # blocks, since the start

    @classmethod
    def of(cls, core: EngineCore) -> StepStats:
        """After a call of `core.step`."""
        plan, scheduler = core.last_scheduled, core.scheduler
        cache = scheduler.kv_cache
        return cls(
            0 if plan is None else plan.total_num_scheduled_tokens, len(scheduler.running), len(scheduler.waiting),
            cache.usage, cache.stats.recent_hit_rate, cache.pool.num_evictions,
        )  # fmt: skip


class StatLogger:
    """Counts tokens between lines.

    Args:
        interval: seconds between lines.
        prefix: of the line.
    """

    def __init__(self, interval: float = 10.0, prefix: str = "") -> None:
        self.interval = interval
        self.prefix = prefix
        self._restart(time.monotonic())

    def _restart(self, now: float) -> None:
        self._since = now
        self._computed_tokens = 0
        self._generated_tokens = 0

    def record(self, stats: StepStats, news: list[EngineCoreOutput]) -> None:
        """Count the step that has just been run; log when the interval is over."""
        self._generated_tokens += sum(len(item.new_token_ids) for item in news)
        self._computed_tokens += stats.num_computed_tokens
        now = time.monotonic()
        if now - self._since >= self.interval:
            self.log(stats, now)

    def log(self, stats: StepStats, now: float) -> None:
        """Write the line and start counting anew."""
        seconds = max(now - self._since, 1e-9)
        logger.info(
            "%scomputed %.1f tokens/s, generated %.1f tokens/s, running %d, waiting %d, "
            "KV cache used %.1f%%, prefix cache hit rate %.1f%%, blocks evicted %d",
            self.prefix,
            self._computed_tokens / seconds,
            self._generated_tokens / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.cache_usage,
            100 * stats.recent_hit_rate,
            stats.num_evictions,
        )
        self._restart(now)
