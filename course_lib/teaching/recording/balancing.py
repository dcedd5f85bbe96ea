"""Replicas as counters: who is given which request by which rule, and when each answer ends.

A step of a replica adds one token to each answer that has a seat, however many those are (decoding is bound
by the weights' trip, lesson 03). Invariant: exact and the same everywhere; nothing is measured.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from course_lib.engine.balancer import Balancer
from course_lib.parallel.layout import split_evenly

RULES = ("cut beforehand", "round_robin", "least_loaded")


@dataclass(frozen=True, slots=True)
class Stay:
    """An answer of `end - first` tokens, in a seat of a replica."""

    job: int
    replica: int
    seat: int
    first: int
    end: int


def spread(jobs: Sequence[tuple[int, int]], rule: str, replicas: int = 2, seats: int = 2) -> list[Stay]:
    """Serve jobs (step of arrival, tokens of the answer), in order of arrival.

    rule: one of RULES; "cut beforehand" knows all jobs at the start and gives each replica a contiguous part.
    """
    parts = split_evenly(len(jobs), replicas)
    balancer = None if rule == RULES[0] else Balancer(replicas, rule)
    waiting: list[deque[int]] = [deque() for _ in range(replicas)]
    free = [list(range(seats)) for _ in range(replicas)]
    coming, running, stays, step = deque(range(len(jobs))), [], [], 0
    while coming or any(waiting) or running:
        while coming and jobs[coming[0]][0] <= step:
            job = coming.popleft()
            if balancer is None:
                replica = next(i for i, part in enumerate(parts) if job in part)
            else:
                replica = balancer.assign()
            waiting[replica].append(job)
        for replica, queue in enumerate(waiting):
            while queue and free[replica]:
                job = queue.popleft()
                stay = Stay(job, replica, free[replica].pop(0), step, step + jobs[job][1])
                running.append(stay)
                stays.append(stay)
        step += 1
        for stay in [stay for stay in running if stay.end == step]:
            running.remove(stay)
            free[stay.replica] = sorted([*free[stay.replica], stay.seat])
            if balancer is not None:
                balancer.release(stay.replica)
    return stays


def last_end(stays: Sequence[Stay], replica: int | None = None) -> int:
    """The step after the last token, of one replica or of all; 0 without any."""
    return max((stay.end for stay in stays if replica in (None, stay.replica)), default=0)


def skewed(
    seed: int, replicas: int, load: float = 0.8, seats: int = 2, count: int = 400
) -> list[tuple[int, int]]:
    """Jobs that arrive evenly and keep the share `load` of all seats busy. One answer in eight has 100 to 300
    tokens, the others up to 20."""
    rng = random.Random(seed)
    lengths = [rng.randint(100, 300) if rng.random() < 1 / 8 else rng.randint(2, 20) for _ in range(count)]
    gap = sum(lengths) / (count * load * replicas * seats)
    return [(int(i * gap), length) for i, length in enumerate(lengths)]


def waits(jobs: Sequence[tuple[int, int]], rule: str, replicas: int, seats: int = 2) -> list[int]:
    """Steps from the arrival of each job to its seat."""
    return [stay.first - jobs[stay.job][0] for stay in spread(jobs, rule, replicas, seats)]


STREAMS: dict[str, list[tuple[int, int]]] = {
    "long, short, long, short …": [(i, 2 if i % 2 else 12) for i in range(12)],
    "short ones first": [(i, 2 if i < 6 else 12) for i in range(12)],
    "all alike": [(i, 7) for i in range(12)],
    "all at once": [(0, 2 if i % 2 else 12) for i in range(12)],
}
