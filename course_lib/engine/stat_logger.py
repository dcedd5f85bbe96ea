"""A line of statistics every few seconds, as servers print it.

vLLM: `vllm/v1/metrics/loggers.py` (`LoggingStatLogger`).
"""

from __future__ import annotations

import logging
import time

from course_lib.core.messages import EngineCoreOutput
from course_lib.core.scheduler import Scheduler
from course_lib.engine.core import EngineCore

logger = logging.getLogger(__name__)


class StatLogger:
    """Counts tokens between lines.

    Args:
        interval: seconds between lines.
    """

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval
        self._restart(time.monotonic())

    def _restart(self, now: float) -> None:
        self._since = now
        self._computed_tokens = 0
        self._generated_tokens = 0

    def record(self, core: EngineCore, news: list[EngineCoreOutput]) -> None:
        """Count the step `core` has just run; log when the interval is over."""
        if core.last_scheduled is None:
            return
        self._generated_tokens += sum(len(item.new_token_ids) for item in news)
        self._computed_tokens += core.last_scheduled.total_num_scheduled_tokens
        now = time.monotonic()
        if now - self._since >= self.interval:
            self.log(core.scheduler, now)

    def log(self, scheduler: Scheduler, now: float) -> None:
        """Write the line and start counting anew."""
        seconds = max(now - self._since, 1e-9)
        stats = scheduler.kv_cache.stats
        hit_rate = 100 * stats.hit_tokens / stats.queried_tokens if stats.queried_tokens else 0.0
        logger.info(
            "computed %.1f tokens/s, generated %.1f tokens/s, running %d, waiting %d, "
            "KV cache used %.1f%%, prefix cache hit rate %.1f%%",
            self._computed_tokens / seconds,
            self._generated_tokens / seconds,
            len(scheduler.running),
            len(scheduler.waiting),
            100 * scheduler.kv_cache.usage,
            hit_rate,
        )
        self._restart(now)
