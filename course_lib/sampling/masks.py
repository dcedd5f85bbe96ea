"""Edits of single rows before the penalties: what may be generated at all.

Owns allowed tokens, bad words, logit bias, minimum length and the user's logits processors. Invariant:
a row without an entry is not touched.

vLLM: `vllm/v1/sample/ops/bad_words.py`, `vllm/v1/sample/logits_processor/`; processors as in V0's
`vllm/model_executor/layers/logits_processor.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch

from course_lib.sampling.metadata import MAX_LOGIT, SamplingMetadata

NEG_INF = float("-inf")


def apply_masks(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Allowed tokens, bad words, logit bias, minimum length, in vLLM's order; in place on [R, V]."""
    outputs = metadata.output_token_ids
    for row, allowed in metadata.allowed_token_ids.items():
        kept = logits[row, allowed]
        logits[row] = NEG_INF
        logits[row, allowed] = kept
    _forbid(logits, ((row, token) for row, words in metadata.bad_words_token_ids.items()
                     for token in _completing_tokens(outputs[row], words)))
    biases = [(row, token, value) for row, bias in metadata.logit_bias.items()
              for token, value in bias.items()]
    if biases:
        rows, tokens, values = zip(*biases, strict=True)
        logits[list(rows), list(tokens)] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    _forbid(logits, ((row, token) for row, (minimum, stop_ids) in metadata.min_tokens.items()
                     if len(outputs[row]) < minimum for token in stop_ids))
    return logits


def _forbid(logits: torch.Tensor, cells: Iterable[tuple[int, int]]) -> None:
    """Set the (row, token) cells to -inf."""
    cells = list(cells)
    if cells:
        rows, tokens = zip(*cells, strict=True)
        logits[list(rows), list(tokens)] = NEG_INF


def _completing_tokens(output: list[int], words: list[list[int]]) -> list[int]:
    """Last tokens of the words whose first tokens end the output."""
    return [word[-1] for word in words if len(word) == 1 or output[1 - len(word):] == word[:-1]]


def apply_logits_processors(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Run the user's processors on their rows, one after the other; in place on [R, V].

    Raises ValueError if one does not return a row of logits.
    """
    for row, (processors, prompt_ids) in metadata.logits_processors.items():
        values = logits[row]
        for processor in processors:
            output_ids = metadata.output_token_ids[row]
            if _takes_prompt(processor):
                values = processor(prompt_ids, output_ids, values)
            else:
                values = processor(output_ids, values)
            if not isinstance(values, torch.Tensor) or values.shape != logits[row].shape:
                got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise ValueError(f"logits_processors: {processor!r} must return logits of shape "
                                 f"{tuple(logits[row].shape)}, it returned {got}.")
        logits[row] = values.clamp(max=MAX_LOGIT)  # +inf, "force this token", would make softmax NaN
    return logits


def _takes_prompt(processor: Callable) -> bool:
    """vLLM's rule: three parameters are (prompt_ids, output_ids, logits), two (output_ids, logits)."""
    return len(inspect.signature(processor).parameters) == 3
