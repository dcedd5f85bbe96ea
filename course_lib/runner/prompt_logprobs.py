"""Log-probabilities of a prompt's own tokens, collected chunk by chunk.

Position i's hidden state predicts token i + 1, so a chunk that computes positions [a, b) yields
tokens a + 1 to b; the last prompt token's prediction is the first output token and not ours. With
chunked prefill the pieces arrive over several steps, and after a preemption they arrive again.

vLLM: `_get_prompt_logprobs_dict` in `vllm/v1/worker/gpu_model_runner.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from course_lib.core.messages import LogprobsLists
from course_lib.sampling.sampler import compute_logprobs, gather_logprobs

# Rows of logits held at once: 128 x 49,152 float32 are 25 MB, and a long prompt must not need more.
_ROWS = 128


class PendingPromptLogprobs:
    """Args:
    prompt_token_ids: P tokens.
    num_logprobs: how many alternatives per position (-1: the whole vocabulary).
    """

    def __init__(self, prompt_token_ids: list[int], num_logprobs: int) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.num_logprobs = num_logprobs
        self._done = 0  # tokens 1 .. _done have their log-probabilities
        self._collected = LogprobsLists([], [], [])

    @property
    def is_complete(self) -> bool:
        return self._done == len(self.prompt_token_ids) - 1

    def add(
        self, hidden: torch.Tensor, start: int, compute_logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Take the hidden states [n, hidden size] of positions `start` to `start + n`."""
        wanted = len(self.prompt_token_ids) - 1
        first, end = max(start, self._done), min(start + len(hidden), wanted)
        for begin in range(first, end, _ROWS):
            stop = min(begin + _ROWS, end)
            logprobs = compute_logprobs(compute_logits(hidden[begin - start : stop - start]))
            targets = torch.tensor(self.prompt_token_ids[begin + 1 : stop + 1], device=hidden.device)
            found = gather_logprobs(logprobs, self.num_logprobs, targets)
            self._collected.token_ids += found.token_ids.tolist()
            self._collected.logprobs += found.logprobs.tolist()
            self._collected.ranks += found.ranks.tolist()
        self._done = max(self._done, end)

    def result(self) -> LogprobsLists:
        """Rows for tokens 1 to P - 1."""
        return self._collected
