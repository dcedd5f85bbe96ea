"""What the scheduler and the model runner say to each other.

One `SchedulerOutput` goes down each step, one `ModelRunnerOutput` comes back. The runner keeps its
own copy of every request's tokens and block table, so the scheduler sends *differences*: the whole
of a request once (`NewRequestData`), afterwards only its new blocks. Plain lists and ints, no
tensors: the messages cross process borders and schedules can be tested without torch.

vLLM: `vllm/v1/core/sched/output.py`, `vllm/v1/outputs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from course_lib.sampling_params import SamplingParams


@dataclass(slots=True)
class NewRequestData:
    """A request the runner has not seen, or one resumed after preemption."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # non-empty only when resumed
    sampling_params: SamplingParams
    block_ids: list[int]
    num_computed_tokens: int


@dataclass(slots=True)
class CachedRequestData:
    """Differences for requests the runner already holds, as parallel lists."""

    request_ids: list[str] = field(default_factory=list)
    new_block_ids: list[list[int]] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    # Of the tokens that the step computes, those that were sampled: stages of a pipeline before the last one, which
    # samples, have them from here. Empty without a pipeline.
    new_token_ids: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class SchedulerOutput:
    """One step's plan. `num_scheduled_tokens` keeps scheduling order."""

    new_requests: list[NewRequestData]
    cached_requests: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    preempted_request_ids: set[str]  # lost their blocks; the runner keeps their sampling state
    finished_request_ids: set[str]  # finished since the last step; the runner forgets them

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute and nothing to tell the runner."""
        return not (self.num_scheduled_tokens or self.preempted_request_ids or self.finished_request_ids)


@dataclass(slots=True)
class LogprobsLists:
    """Log-probabilities of R tokens: column 0 is the token itself, then the top k in order."""

    token_ids: list[list[int]]  # [R][k + 1]
    logprobs: list[list[float]]  # [R][k + 1], natural log
    ranks: list[int]  # [R], 1-based rank of column 0 in the vocabulary


@dataclass(slots=True)
class ModelRunnerOutput:
    """What one step produced, row i belonging to `request_ids[i]`."""

    request_ids: list[str]
    sampled_token_ids: list[list[int]]  # [] for a request whose prompt is not yet complete
    logprobs: list[LogprobsLists | None] | None = None
    prompt_logprobs: dict[str, LogprobsLists] = field(default_factory=dict)  # positions 1..P-1, once
    errors: dict[str, str] = field(default_factory=dict)  # requests whose own code (a logits processor) failed


@dataclass(slots=True)
class EngineCoreOutput:
    """News of one request after one step, from the scheduler to the output processor."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: LogprobsLists | None = None  # one row per new token
    prompt_logprobs: LogprobsLists | None = None
    num_cached_tokens: int = 0
    first_scheduled_time: float = 0.0  # seconds, `time.time`
    num_preemptions: int = 0
