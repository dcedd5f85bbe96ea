"""Log-probabilities of one request, from the sampler's lists to what the user reads.

Owns one dictionary per position, `{token id: Logprob}`: the token itself first, then the most likely
ones in order. Invariant: `cumulative_logprob` is the sum over the output tokens seen so far.

vLLM: `vllm/v1/engine/logprobs.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.core.messages import LogprobsLists
from course_lib.engine.token_text import TokenizerText
from course_lib.outputs import Logprob, PromptLogprobs, SampleLogprobs

if TYPE_CHECKING:
    from course_lib.sampling_params import SamplingParams


class LogprobsProcessor:
    """Collects the log-probabilities of one request."""

    def __init__(self, tokenizer: Any, num_logprobs: int | None, num_prompt_logprobs: int | None) -> None:
        self._text = None if tokenizer is None else TokenizerText.of(tokenizer)
        self._num_logprobs = num_logprobs
        self._num_prompt_logprobs = num_prompt_logprobs
        self.logprobs: SampleLogprobs | None = None if num_logprobs is None else []
        self.cumulative_logprob: float | None = None if num_logprobs is None else 0.0
        self.prompt_logprobs: PromptLogprobs | None = None if num_prompt_logprobs is None else [None]

    @classmethod
    def from_request(cls, tokenizer: Any, params: SamplingParams) -> LogprobsProcessor:
        """For a new request; with detokenize=False `decoded_token` stays None."""
        return cls(tokenizer if params.detokenize else None, params.logprobs, params.prompt_logprobs)

    def update_from_sample(self, lists: LogprobsLists) -> None:
        """Add one position per row of `lists`; ignored if the request asked for none."""
        if self.logprobs is None:
            return
        for token_ids, logprobs, rank in zip(lists.token_ids, lists.logprobs, lists.ranks, strict=True):
            self.logprobs.append(self._position(token_ids, logprobs, rank, self._num_logprobs))
            self.cumulative_logprob += logprobs[0]

    def update_from_prompt(self, lists: LogprobsLists) -> None:
        """Add prompt positions 1, 2, …, in one call or in chunks; position 0 is None."""
        if self.prompt_logprobs is None:
            return
        for token_ids, logprobs, rank in zip(lists.token_ids, lists.logprobs, lists.ranks, strict=True):
            self.prompt_logprobs.append(self._position(token_ids, logprobs, rank, self._num_prompt_logprobs))

    def truncate(self, num_tokens: int) -> None:
        """Drop output positions past `num_tokens` (a stop string ended the output earlier)."""
        if self.logprobs is not None and len(self.logprobs) > num_tokens:
            del self.logprobs[num_tokens:]
            self.cumulative_logprob = sum(next(iter(p.values())).logprob for p in self.logprobs)

    def take_prompt_logprobs(self) -> PromptLogprobs | None:
        """For DELTA outputs: the prompt's log-probabilities once, afterwards an empty list."""
        taken = self.prompt_logprobs
        if taken is not None:
            self.prompt_logprobs = []
        return taken

    def _position(self, token_ids: list[int], logprobs: list[float], rank: int,
                  num_logprobs: int) -> dict[int, Logprob]:
        """Column 0 with its own rank, then columns 1… with ranks 1…

        The batch may carry more columns than this request asked for.
        """
        count = len(token_ids) if num_logprobs == -1 else min(num_logprobs + 1, len(token_ids))
        text = self._text
        ranks = [rank, *range(1, count)]
        result: dict[int, Logprob] = {}
        for i in range(count):
            token_id = token_ids[i]
            if token_id not in result:
                decoded = None if text is None else text.token_text(token_id)
                result[token_id] = Logprob(logprobs[i], ranks[i], decoded)
        return result
