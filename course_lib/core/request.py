"""The life of one request, as the scheduler sees it.

A request owns its tokens, its block table and one counter, `num_computed_tokens`: how many of its
tokens have their keys and values in the cache (or are being computed in the step under way). There
is no "prefill" or "decode" state: a running request is whatever distance `num_computed_tokens` is
behind `num_tokens`.

Invariant: 0 <= num_computed_tokens <= num_tokens, and `block_ids` has room for every computed token.

vLLM: `vllm/v1/request.py`.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from course_lib.core.prefix_hash import CacheKeys
    from course_lib.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    """Everything after PREEMPTED is finished."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5


FINISH_REASONS = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
}


class Request:
    """One sequence to generate.

    Args:
        request_id: unique among live requests.
        prompt_token_ids: at least one token.
        sampling_params: validated; `max_tokens` already resolved to a number.
        eos_token_id: the token that ends generation unless `ignore_eos`.
        arrival_time: seconds (`time.time`); orders requests of equal priority.
        priority: smaller is served first (only under the "priority" policy).
        cache_keys: what besides equal tokens another request must have to share cached prefixes; None: nothing.
    """

    __slots__ = (
        "request_id", "sampling_params", "eos_token_id", "arrival_time", "priority", "cache_keys",
        "status", "stop_reason", "num_prompt_tokens", "token_ids", "num_computed_tokens",
        "num_cached_tokens", "first_scheduled_time", "block_ids", "block_hashes", "num_registered_blocks", "num_preemptions",
        "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "needs_prompt_logprobs", "runs_ahead",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        eos_token_id: int | None = None,
        arrival_time: float = 0.0,
        priority: int = 0,
        cache_keys: CacheKeys | None = None,
    ) -> None:
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.eos_token_id = eos_token_id
        self.arrival_time = arrival_time
        self.priority = priority
        self.cache_keys = cache_keys
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None

        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = list(prompt_token_ids)  # prompt, then output
        self.num_computed_tokens = 0
        self.num_cached_tokens = -1  # prefix-cache hit at first admission; -1 until then
        self.first_scheduled_time = 0.0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # one per full block of `token_ids`, extended as it grows
        self.num_registered_blocks = 0  # how many of `block_ids` are offered to the prefix cache
        self.num_preemptions = 0

        # Read on every generated token: copied out of the params once.
        self.max_tokens = sampling_params.max_tokens
        self.min_tokens = sampling_params.min_tokens
        self.ignore_eos = sampling_params.ignore_eos
        self.stop_token_ids = frozenset(sampling_params.stop_token_ids or ())
        self.needs_prompt_logprobs = sampling_params.prompt_logprobs is not None
        self.runs_ahead = samples_without_host(sampling_params)

    @property
    def num_tokens(self) -> int:
        """Prompt plus output tokens so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    @property
    def finish_reason(self) -> str | None:
        """ "stop", "length", "abort", or None while unfinished."""
        return FINISH_REASONS.get(self.status)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed_tokens})"
        )


def samples_without_host(params: SamplingParams) -> bool:
    """Whether a token can be sampled before the host has seen the one before it."""
    return not (
        params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
        or params.min_tokens
        or params.bad_words
        or params.logits_processors
        or params.logprobs is not None
        or params.prompt_logprobs is not None
    )


def check_stop(request: Request, max_model_len: int) -> bool:
    """Decide whether the newest output token ends the request; sets its status and stop reason.

    In vLLM's order: nothing but the length may stop before `min_tokens`; then end-of-sequence
    unless ignored, then stop token ids, then the length limits. (A token that is both the stop
    token and the last one allowed reports "stop".)

    vLLM: `vllm/v1/core/sched/utils.py`.
    """
    num_output = len(request.token_ids) - request.num_prompt_tokens
    if num_output >= request.min_tokens:
        last = request.token_ids[-1]
        if last == request.eos_token_id and not request.ignore_eos:
            request.status = RequestStatus.FINISHED_STOPPED
            return True
        if last in request.stop_token_ids:
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = last
            return True
    if num_output >= request.max_tokens or len(request.token_ids) >= max_model_len:
        request.status = RequestStatus.FINISHED_LENGTH
        return True
    return False
