"""What a front and its replicas say to each other: one dataclass per message, pickled.

A front's messages are carried out in the order in which they were sent; what a replica says comes in order, too, and
all of it arrives even if the replica has ended meanwhile.

vLLM: `EngineCoreRequestType`, `EngineCoreOutputs` in `vllm/v1/engine/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from course_lib.core.messages import EngineCoreOutput
from course_lib.executor.portable import Failure
from course_lib.engine.stat_logger import StepStats

# ---- to a replica -----------------------------------------------------------------------------------


@dataclass(slots=True)
class AddRequest:
    """Serve a pickled `Request`; if it has output tokens already, go on after them."""

    request_id: str
    request: bytes
    wave: int = 0


@dataclass(slots=True)
class AbortRequests:
    request_ids: list[str]


@dataclass(slots=True)
class Reset:
    """Drop all requests and cached prefixes."""


@dataclass(slots=True)
class Call:
    """Call a method of the core with a pickled tuple, between two steps; `number` comes back with the answer."""

    number: int
    method: str
    args: bytes


@dataclass(slots=True)
class StartWave:
    wave: int


# ---- from a replica ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Ready:
    """The model is loaded. Sent once."""

    max_model_len: int  # may be lower than asked for, if that was left to the engine


@dataclass(slots=True)
class News:
    """What one step has produced."""

    outputs: list[EngineCoreOutput]
    stats: StepStats | None  # None without log_stats


@dataclass(slots=True)
class Answer:
    number: int
    value: Any  # a Failure if it has raised


@dataclass(slots=True)
class Failed:
    """Something has raised: the start, or a step, after which the replica is empty; it lives on unless `fatal`."""

    failure: Failure
    fatal: bool


@dataclass(slots=True)
class WaveComplete:
    wave: int


@dataclass(slots=True)
class Alone:
    """Found asleep by a request of an earlier wave; has begun `wave`."""

    wave: int
