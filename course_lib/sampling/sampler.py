"""From the logits of R rows to R token ids.

Owns the order of the steps, which is vLLM V1's: log-probabilities of the unmodified logits; float32;
masks, bias and minimum length; penalties; the user's processors; greedy rows take the argmax; the
others divide by the temperature, truncate (min-p, top-k, top-p) and draw. Invariant: what a seeded row
draws depends on its own logits, parameters and generator, not on its batch mates or its place among
them; torch's global generator is never touched.

vLLM: `vllm/v1/sample/sampler.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from course_lib.sampling import blocks
from course_lib.sampling.draw import draw
from course_lib.sampling.masks import apply_logits_processors, apply_masks
from course_lib.sampling.metadata import SamplingMetadata
from course_lib.sampling.penalties import apply_penalties
from course_lib.sampling.topk_topp import apply_top_k_top_p
from course_lib.sampling_params import GREEDY_TEMPERATURE


@dataclass(slots=True)
class LogprobsTensors:
    """Log-probabilities of R tokens: column 0 is the token itself, then the k most likely."""

    token_ids: torch.Tensor  # [R, k + 1] int32
    logprobs: torch.Tensor  # [R, k + 1] float32, natural log
    ranks: torch.Tensor  # [R] int32, 1-based rank of column 0


@dataclass(slots=True)
class SamplerOutput:
    """What one call of the sampler gives."""

    sampled_token_ids: torch.Tensor  # [R] int64
    logprobs: LogprobsTensors | None


class Sampler:
    """Stateless; all randomness comes from the generators in the metadata."""

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        """Sample one token per row. logits [R, V] of any float dtype; they are not changed."""
        processed = self.process(logits, metadata)
        token_ids = self.sample(processed, metadata)
        logprobs = None
        if metadata.max_num_logprobs is not None:
            logprobs = gather_logprobs(compute_logprobs(logits), metadata.max_num_logprobs, token_ids)
        return SamplerOutput(token_ids, logprobs)

    @staticmethod
    def process(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """float32 logits with masks, penalties and the user's processors applied, [R, V].

        A copy, unless all rows are greedy and nothing is applied.
        """
        if metadata.all_greedy and not metadata.changes_logits:
            return logits.to(torch.float32)
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        apply_masks(logits, metadata)
        if not metadata.no_penalties:
            apply_penalties(logits, metadata)
        return apply_logits_processors(logits, metadata)

    @staticmethod
    def sample(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
        """Token ids [R] int64 from processed logits [R, V] float32, which random rows overwrite.

        In place because the buffers are large: fresh ones cost more in page faults than the arithmetic.
        """
        greedy = None if metadata.all_random else blocks.argmax(logits)
        if metadata.all_greedy:
            return greedy
        temperature = metadata.temperature
        is_greedy = temperature < GREEDY_TEMPERATURE
        logits.div_(torch.where(is_greedy, 1.0, temperature).unsqueeze(1))
        if not (metadata.top_k is None and metadata.top_p is None and metadata.min_p is None):
            apply_top_k_top_p(logits, metadata.top_k, metadata.top_p, metadata.min_p)
        probs = torch.softmax(logits, dim=-1, out=logits)
        drawn = draw(probs, metadata.generators, metadata.default_generator)
        return drawn if greedy is None else torch.where(is_greedy, greedy, drawn)


def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] logits of any float dtype -> [N, V] float32 log-probabilities."""
    return logits.log_softmax(dim=-1, dtype=torch.float32)


def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
    """The given tokens and the `num_logprobs` most likely ones of each row.

    logprobs [N, V] float32; token_ids [N] int64; num_logprobs 0: the given tokens only, -1: all V.
    The rank of a token is 1 + the number of tokens with a strictly larger log-probability.
    """
    own_ids = token_ids.to(torch.int64).unsqueeze(1)
    own = logprobs.gather(1, own_ids)
    ranks = (logprobs > own).sum(dim=1) + 1
    if num_logprobs == 0:
        return LogprobsTensors(own_ids.to(torch.int32), own, ranks.to(torch.int32))
    if num_logprobs == -1 or num_logprobs >= logprobs.shape[1]:
        values, ids = logprobs.sort(dim=1, descending=True, stable=True)
    else:
        values, ids = blocks.topk(logprobs, num_logprobs)
    return LogprobsTensors(torch.cat([own_ids, ids], dim=1).to(torch.int32),
                           torch.cat([own, values], dim=1), ranks.to(torch.int32))
