"""Which rank is to blame when an engine of several processes comes to a halt.

When one rank fails, the others fail too, a little later, or wait for it for ever: each in a collective. So those
whose traceback goes through one are innocent as long as there is anybody whose does not. Pure functions of what is
known about each worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from course_lib.executor.portable import Failure

_COLLECTIVES = "torch_group.py"  # in a traceback: this rank waits for the others, or has lost them


@dataclass(frozen=True)
class Witness:
    """What is known about one worker."""

    title: str
    failure: Failure | None = None  # what it has reported
    ended: str | None = None  # how its process has ended, such as "was killed by SIGKILL"
    traceback: str = ""  # where it is, or was when it crashed
    is_idle: bool = False  # at that place it waited for its next call

    @property
    def is_evident(self) -> bool:
        """Whether it is to blame whatever the others say."""
        return self.ended is not None or (self.failure is not None and _COLLECTIVES not in self.failure.traceback)

    @property
    def may_hang(self) -> bool:
        """Whether it waits neither for other ranks nor for its next call."""
        return _COLLECTIVES not in self.traceback and not self.is_idle


def find_culprits(witnesses: Sequence[Witness]) -> list[Witness]:
    """Those who are to blame; everybody who is in trouble if it cannot be told."""
    evident = [one for one in witnesses if one.is_evident]
    if evident:
        return evident
    failed = [one for one in witnesses if one.failure is not None]
    if failed:
        return failed
    return [one for one in witnesses if one.may_hang] or list(witnesses)


def describe(culprits: Sequence[Witness], activity: str, time_limit: str) -> str:
    """One sentence with the ranks, what became of them and during what; below it their last tracebacks.

    `time_limit` says how long a rank may take, which is what those have done wrong that neither failed nor ended.
    """
    sentences, tracebacks = [], []
    for one in culprits:
        if one.ended is not None:
            what = one.ended
        elif one.failure is not None:
            what = f"failed with {one.failure.summary}"
        else:
            what = f"hangs: it has not answered within {time_limit}"
        sentences.append(f"{one.title} {what}")
        traceback = one.failure.traceback if one.failure is not None else one.traceback
        if traceback.strip():
            tracebacks.append(f"\nThe last traceback of {one.title}:\n{traceback.rstrip()}")
    what = f"{'; '.join(sentences)}; this happened during {activity}. The engine has stopped: make a new one."
    return what + "".join(tracebacks)
