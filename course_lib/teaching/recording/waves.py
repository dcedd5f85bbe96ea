"""Ranks in lock step without processes: all that can happen between them, in any order that a seed picks.

A rank waits in a collective until all ranks stand in the same one; messages of one sender arrive in order,
and late. `interleave` lets whoever can act do so in random order, with `WaveCoordinator` on the sending side
and any `WaveMember` (the engine's, or a learner's) on the others. Invariant: the same seed and the same
behaviour give the same run; nothing hangs, a run that cannot go on is told as such.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from course_lib.engine.coordinator import WaveCoordinator

MOST_ACTIONS = 20_000


@dataclass(slots=True)
class Run:
    """What came of one interleaving; `problem` is None if all requests were served and all sleep at the end."""

    problem: str | None = None
    num_requests: int = 0
    served: int = 0
    passes: list[Counter[int]] = field(default_factory=list)  # by rank: passes in each wave
    log: list[str] = field(default_factory=list)  # what happened, in order

    @property
    def num_waves(self) -> int:
        return len(self.passes[0])


class _Rank:
    """A replica, cut into the moments between which others can act."""

    def __init__(self, number: int, member: Any, run: Run) -> None:
        self.number, self.member, self.run = number, member, run
        self.inbox: deque[tuple[str, int, int]] = deque()  # kind, wave, passes that a request needs
        self.told: deque[tuple[str, int]] = deque()  # on its way to the coordinator
        self.left: list[int] = []  # passes that its requests still need
        self.waits_in: str | None = None
        self.result: bool | None = None  # of that collective, not yet taken in
        self.passes: Counter[int] = Counter()

    def act(self, rng: random.Random) -> bool:
        """Do one thing; False if there is nothing to do but to wait."""
        if self.waits_in is not None:
            if self.result is None:
                return False
            self._leave_collective()
        elif self.inbox and (not self.member.running or rng.random() < 0.5):
            self._take_message()
        elif self.member.running:
            self.passes[self.member.wave] += 1
            self.waits_in = "a pass"
            self._say(f"enters a pass of wave {self.member.wave}" + ("" if self.left else " (dummy)"))
        else:
            return False
        return True

    def _take_message(self) -> None:
        kind, wave, needs = self.inbox.popleft()
        if kind == "start":
            self.member.on_start(wave)
            self._say(f"hears the call to wave {wave}" + ("" if self.member.running else " and sleeps on"))
            return
        self.left.append(needs)
        alone = self.member.on_request(wave)
        self._say(f"gets a request sent in wave {wave}" + (", finds itself alone" if alone else ""))
        if alone:
            self.told.append(("alone", self.member.wave))

    def _leave_collective(self) -> None:
        kind, result, self.waits_in, self.result = self.waits_in, self.result, None, None
        if kind == "an agreement":
            wave = self.member.wave
            if self.member.agreed(result):
                self._say(f"ends wave {wave}")
                if self.number == 0:
                    self.told.append(("complete", wave))
            return
        self.run.served += sum(needs == 1 for needs in self.left)
        self.left = [needs - 1 for needs in self.left if needs > 1]
        if self.member.after_pass():
            self.waits_in = "an agreement"

    def _say(self, what: str) -> None:
        self.run.log.append(f"rank {self.number} {what}")


def interleave(
    make_member: Callable[[int], Any],
    seed: int,
    num_ranks: int | None = None,
    num_requests: int | None = None,
    agree_every: int | None = None,
) -> Run:
    """Requests at random moments, the rest in any order that pipes and collectives permit.

    make_member: called with `agree_every`. What it or its methods raise passes through, but for an
    AssertionError, which is told as a problem.
    """
    rng, run = random.Random(seed), Run()
    num_ranks = num_ranks or rng.randint(2, 4)
    agree_every = agree_every or rng.choice([1, 2, 5])
    run.num_requests = num_requests or rng.randint(1, 12)
    ranks = [_Rank(number, make_member(agree_every), run) for number in range(num_ranks)]
    run.passes = [rank.passes for rank in ranks]
    try:
        run.problem = _play(ranks, run, rng)
    except AssertionError as error:
        run.problem = str(error)
    return run


def _play(ranks: list[_Rank], run: Run, rng: random.Random) -> str | None:
    front, patience, sent = WaveCoordinator(), rng.choice([0.02, 0.2, 0.9]), 0

    def call(wave: int, but: _Rank) -> None:
        run.log.append(f"the front calls the others to wave {wave}")
        for rank in ranks:
            if rank is not but:
                rank.inbox.append(("start", wave, 0))

    def hear() -> bool:
        telling = [rank for rank in ranks if rank.told]
        if not telling:
            return False
        rank = rng.choice(telling)
        kind, wave = rank.told.popleft()
        news = "is over" if kind == "complete" else "begun by one alone"
        run.log.append(f"the front hears: wave {wave} {news}")
        if kind == "complete":
            front.on_complete(wave)
        elif front.on_alone(wave):
            call(wave, but=rank)
        return True

    def meet() -> bool:
        if any(rank.waits_in is None or rank.result is not None for rank in ranks):
            return False
        where = {rank.waits_in for rank in ranks}
        if len(where) > 1:
            raise AssertionError("deadlock: " + _where(ranks))
        anybody = any(rank.left for rank in ranks)
        for rank in ranks:
            rank.result = anybody
        return True

    for _ in range(MOST_ACTIONS):
        idle = not any(rank.member.running or rank.inbox or rank.told or rank.waits_in for rank in ranks)
        if sent == run.num_requests and idle:
            break
        if sent < run.num_requests and (idle or rng.random() < patience):
            target = rng.choice(ranks)
            wave, wakes = front.on_request()
            target.inbox.append(("request", wave, rng.randint(1, 6)))
            run.log.append(f"the front sends a request of wave {wave} to rank {target.number}")
            sent += 1
            if wakes:
                call(wave, but=target)
        actors: list[Callable[[], bool]] = [*(lambda rank=rank: rank.act(rng) for rank in ranks), hear, meet]
        rng.shuffle(actors)
        if not any(actor() for actor in actors):
            return "deadlock: " + _where(ranks)
        if any(front.wave > rank.member.wave for rank in ranks if rank.result is None):
            return f"the front is in wave {front.wave}, ahead of a rank: " + _where(ranks)
    else:
        return "somebody never sleeps: passes go on and on"
    if run.served < run.num_requests:
        return f"{run.num_requests - run.served} requests are lost: all ranks sleep"
    if any(rank.passes != ranks[0].passes for rank in ranks):
        return "the ranks ran different numbers of passes"
    return None


def _where(ranks: list[_Rank]) -> str:
    def state(rank: _Rank) -> str:
        if rank.waits_in is None:
            return "is asleep" if not rank.member.running else "is running"
        return f"waits in {rank.waits_in} of wave {rank.member.wave}"

    return ", ".join(f"rank {rank.number} {state(rank)}" for rank in ranks)
