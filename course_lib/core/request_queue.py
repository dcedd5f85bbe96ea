"""Who is next: waiting requests in first-come or priority order.

Both queues answer the same five questions. A preempted request returns to the *front* of its class:
it has been admitted before, and letting newcomers overtake it would starve it.

vLLM: `vllm/v1/core/sched/request_queue.py`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from course_lib.core.request import Request


class FCFSQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()

    def add(self, request: Request) -> None:
        self._queue.append(request)

    def return_preempted(self, request: Request) -> None:
        self._queue.appendleft(request)

    def peek(self) -> Request:
        return self._queue[0]

    def pop(self) -> Request:
        return self._queue.popleft()

    def remove(self, request: Request) -> None:
        self._queue.remove(request)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._queue)


def priority_key(request: Request) -> tuple[int, float]:
    """Sorts the request to serve first to the front; the largest key is the first to be preempted."""
    return request.priority, request.arrival_time


class PriorityQueue:
    """Smallest `priority` first; among equals, earliest arrival; among those, the order they were added in."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float], int, Request]] = []
        self._last = 0  # counts up behind, and down in front, so that requests themselves are never compared
        self._first = 0

    def add(self, request: Request) -> None:
        self._last += 1
        heapq.heappush(self._heap, (priority_key(request), self._last, request))

    def return_preempted(self, request: Request) -> None:
        self._first -= 1
        heapq.heappush(self._heap, (priority_key(request), self._first, request))

    def peek(self) -> Request:
        return self._heap[0][2]

    def pop(self) -> Request:
        return heapq.heappop(self._heap)[2]

    def remove(self, request: Request) -> None:
        self._heap = [entry for entry in self._heap if entry[2] is not request]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (entry[2] for entry in sorted(self._heap, key=lambda entry: entry[:2]))
