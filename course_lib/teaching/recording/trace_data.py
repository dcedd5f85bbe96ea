"""What an engine did, step by step, as plain data: what every explorer draws from.

Invariants: a trace refers to nothing of the engine and survives JSON; a step is in it only if it ran to its
end; every request has one name of its own, under which all parts of the trace know it.

Times are seconds since the recording began.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(slots=True)
class Step:
    """One step of the engine. Requests are called by their names in `Trace.requests`.

    `block_tables`, `waiting`, `cached_free` and `num_free` are as the scheduler left them, before the model
    ran; the order of `scheduled` is the scheduler's, that of `waiting` the queue's.
    """

    index: int
    start: float
    schedule_s: float
    scheduled: dict[str, int]  # tokens that this step computes
    computed: dict[str, int]  # tokens computed before this step, of every running request
    block_tables: dict[str, tuple[int, ...]]  # of every running request
    waiting: tuple[str, ...]
    preempted: tuple[str, ...]  # lost their blocks in this step; they wait
    cached_free: tuple[int, ...]  # blocks that nobody holds, whose content a prefix could still hit
    num_free: int  # blocks that nobody holds, with cached content or without
    execute_s: float = 0.0
    update_s: float = 0.0
    sampled: dict[str, list[int]] = field(default_factory=dict)  # new token ids
    finished: dict[str, str] = field(default_factory=dict)  # and why: a RequestTrace's reason


@dataclass(slots=True)
class RequestTrace:
    """One sequence; None where the recording ended before it happened.

    `tokenize_s` is the time the frontend took to tokenize and check the prompt; `detokenize_s` adds up what
    it spent turning this request's tokens into text, step after step.
    """

    id: str
    num_prompt_tokens: int
    arrival: float
    tokenize_s: float = 0.0
    first_scheduled: float | None = None
    first_token: float | None = None  # when the frontend had it
    finished: float | None = None
    reason: str | None = None  # "stop", "length", "abort", or "dropped": the engine was reset
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    detokenize_s: float = 0.0

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from arrival."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def total(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(slots=True)
class Trace:
    """A recording. `requests` is in order of arrival; the limits are the engine's."""

    block_size: int
    num_blocks: int
    token_budget: int  # tokens per step, `max_num_batched_tokens`
    max_num_seqs: int
    steps: list[Step] = field(default_factory=list)
    requests: dict[str, RequestTrace] = field(default_factory=dict)

    def step(self, index: int) -> Step:
        """Step `index`, from 0. Raises ValueError if there is none, saying which there are."""
        if not self.steps:
            raise ValueError("the trace has no steps: generate something inside `with record(llm) as trace:`")
        if not 0 <= index < len(self.steps):
            raise ValueError(f"step={index}: this trace has steps 0 to {len(self.steps) - 1}")
        return self.steps[index]

    def to_json(self) -> str:
        """The whole trace as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """The trace that `to_json` wrote. Raises ValueError if `text` is something else."""
        try:
            data = json.loads(text)
            for step in data["steps"]:
                for name in ("waiting", "preempted", "cached_free"):
                    step[name] = tuple(step[name])
                step["block_tables"] = {key: tuple(table) for key, table in step["block_tables"].items()}
            data["steps"] = [Step(**step) for step in data["steps"]]
            data["requests"] = {key: RequestTrace(**request) for key, request in data["requests"].items()}
            return cls(**data)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError("text is not a trace: give what Trace.to_json() returned") from error
