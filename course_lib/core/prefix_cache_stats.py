"""How much the prefix cache saves: what was looked up, and what was found.

Every request is counted once, when it is first admitted; one that computes all its positions anyway
(for log-probabilities of the prompt) looks nothing up and is not counted. Totals grow as long as the
engine lives. The recent hit rate is over the last 1,000 requests: after a change of traffic a rate since
the start would take days to follow.

Invariant: the sums kept for the recent rate are those of the requests in the window.

vLLM: `PrefixCacheStats` and `CachingMetrics` in `vllm/v1/metrics/stats.py`.
"""

from __future__ import annotations

from collections import deque

WINDOW = 1000  # requests


class PrefixCacheStats:
    """Counts of requests, and of their tokens, since the engine started."""

    __slots__ = (
        "requests", "hit_requests", "queried_tokens", "hit_tokens", "_recent", "_recent_queried", "_recent_hit",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0  # that looked their tokens up
        self.hit_requests = 0  # of these, how many found at least one block
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.forget_recent()

    def record(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Count one request that had `num_tokens` and found `num_hit_tokens` of them."""
        self.requests += 1
        self.hit_requests += num_hit_tokens > 0
        self.queried_tokens += num_tokens
        self.hit_tokens += num_hit_tokens
        self._recent.append((num_tokens, num_hit_tokens))
        self._recent_queried += num_tokens
        self._recent_hit += num_hit_tokens
        if len(self._recent) > WINDOW:
            queried, hit = self._recent.popleft()
            self._recent_queried -= queried
            self._recent_hit -= hit

    @property
    def hit_rate(self) -> float:
        """Fraction of all tokens looked up that were found, 0 to 1."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def recent_hit_rate(self) -> float:
        """The same over the last `WINDOW` requests."""
        return self._recent_hit / self._recent_queried if self._recent_queried else 0.0

    def forget_recent(self) -> None:
        """Start the recent rate anew: the cache was emptied, what was found before says nothing."""
        self._recent: deque[tuple[int, int]] = deque()
        self._recent_queried = 0
        self._recent_hit = 0
