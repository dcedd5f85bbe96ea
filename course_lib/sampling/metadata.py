"""What the sampler needs to know about the R rows that sample in one step.

Owns only data. Invariant: row i of every field is row i of the logits. Whatever no row uses is None or
empty, and then costs nothing.

vLLM: `vllm/v1/sample/metadata.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

MAX_LOGIT = 1e30  # stays finite in float32 when divided by the smallest temperature, 0.01


@dataclass
class SamplingMetadata:
    """Sampling state of R rows; tensors are on the device of the logits."""

    temperature: torch.Tensor | None  # [R] float32; None when all rows are greedy; < 1e-5: greedy row
    all_greedy: bool
    all_random: bool
    default_generator: torch.Generator  # for rows without a seed; owned by the engine
    top_p: torch.Tensor | None = None  # [R] float32; 1 is off
    top_k: torch.Tensor | None = None  # [R] int32; <= 0 or >= V is off
    min_p: torch.Tensor | None = None  # [R] float32; 0 is off
    generators: dict[int, torch.Generator] = field(default_factory=dict)  # seeded rows
    max_num_logprobs: int | None = None  # 0: only the sampled token; -1: the whole vocabulary

    no_penalties: bool = True
    presence_penalties: torch.Tensor | None = None  # [R] float32, these three only with penalties
    frequency_penalties: torch.Tensor | None = None
    repetition_penalties: torch.Tensor | None = None
    prompt_token_ids: torch.Tensor | None = None  # [R, P] int64, padded with V; only with penalties
    output_token_ids: list[list[int]] = field(default_factory=list)  # [R], the live lists

    min_tokens: dict[int, tuple[int, frozenset[int]]] = field(default_factory=dict)  # row: (n, stop ids)
    logit_bias: dict[int, dict[int, float]] = field(default_factory=dict)
    allowed_token_ids: dict[int, list[int]] = field(default_factory=dict)
    bad_words_token_ids: dict[int, list[list[int]]] = field(default_factory=dict)
    logits_processors: dict[int, tuple[list[Callable], list[int]]] = field(default_factory=dict)

    @property
    def changes_logits(self) -> bool:
        """Whether anything edits the logits before the temperature."""
        return not self.no_penalties or bool(
            self.min_tokens or self.logit_bias or self.allowed_token_ids
            or self.bad_words_token_ids or self.logits_processors)
