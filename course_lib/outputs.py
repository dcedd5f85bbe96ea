"""What a request gives back.

Owns the plain result classes that `LLM.generate`, `LLMEngine.step` and `AsyncLLM.generate` hand to the
user. Invariant: nothing in them refers to the engine, so they can be kept, compared, copied and
pickled.

vLLM: `vllm/outputs.py`, `vllm/logprobs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """One candidate at one position."""

    logprob: float
    """Natural log of its probability under the model's unmodified logits."""
    rank: int | None = None
    """1 for the most likely token of the vocabulary."""
    decoded_token: str | None = None


PromptLogprobs = list[dict[int, Logprob] | None]  # None for the first token: nothing predicts it
SampleLogprobs = list[dict[int, Logprob]]


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds on one clock; None: not yet."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass
class CompletionOutput:
    """One of the n outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum over `token_ids` of the log-probability of each; None unless `logprobs` was asked for."""
    logprobs: SampleLogprobs | None
    finish_reason: str | None = None
    """"stop", "length" or "abort"; None while running."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for EOS and everything else."""
    lora_request: Any = field(default=None, repr=False)

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """Everything known about a request; with `RequestOutputKind.DELTA`, what is new in `outputs`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    """Prompt tokens whose keys and values came from the prefix cache."""

    def add(self, next_output: RequestOutput, aggregate: bool) -> None:
        """Merge a later output of the same request into this one (a slow consumer of a stream).

        `aggregate`: the outputs are deltas, so texts and tokens are appended; otherwise the later
        cumulative output replaces the earlier.
        """
        self.finished |= next_output.finished
        self.metrics = next_output.metrics or self.metrics
        if next_output.prompt_logprobs:
            self.prompt_logprobs = next_output.prompt_logprobs
        mine = {output.index: position for position, output in enumerate(self.outputs)}
        for new in next_output.outputs:
            if new.index not in mine:
                self.outputs.append(new)
            elif aggregate:
                _append_delta(self.outputs[mine[new.index]], new)
            else:
                self.outputs[mine[new.index]] = new


def _append_delta(old: CompletionOutput, new: CompletionOutput) -> None:
    old.text += new.text
    old.token_ids = [*old.token_ids, *new.token_ids]
    if new.logprobs:
        old.logprobs = [*(old.logprobs or ()), *new.logprobs]
    old.cumulative_logprob = new.cumulative_logprob
    old.finish_reason = new.finish_reason
    old.stop_reason = new.stop_reason
