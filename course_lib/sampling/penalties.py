"""Repetition, frequency and presence penalties.

Owns the three formulas (repetition first, as vLLM):

- repetition r, tokens of the prompt or the output: a positive logit is divided by r, others multiplied;
- frequency f: logit -= f * (occurrences in the output);
- presence p: logit -= p if the token occurs in the output.

Invariant: only logits of tokens that occur are touched, so the cost goes with the length of the
history, not with the vocabulary.

vLLM: `vllm/model_executor/layers/utils.py` (`apply_penalties`), with dense masks.
"""

from __future__ import annotations

import torch

from course_lib.sampling.metadata import MAX_LOGIT, SamplingMetadata


def apply_penalties(logits: torch.Tensor, metadata: SamplingMetadata) -> torch.Tensor:
    """Change logits [R, V] float32 (contiguous) in place and return it."""
    vocab = logits.shape[1]
    flat = logits.view(-1)
    repetition = metadata.repetition_penalties
    frequency, presence = metadata.frequency_penalties, metadata.presence_penalties
    rows, tokens = _output_tokens(metadata, logits.device)
    output = rows * vocab + tokens

    prompt_rows, prompt_tokens = _prompt_tokens(metadata, repetition, vocab)
    seen = torch.cat([prompt_rows * vocab + prompt_tokens, output])
    if len(seen):
        r = repetition[torch.cat([prompt_rows, rows])]
        value = flat[seen]
        # A token that occurs twice is read before and written after, so it is penalised once.
        # The clamp is for a tiny r.
        flat[seen] = torch.where(value > 0, value / r, value * r).clamp_(max=MAX_LOGIT)
    if len(output):
        counts = torch.zeros_like(flat).scatter_add_(0, output, torch.ones_like(output, dtype=flat.dtype))
        flat[output] = flat[output] - frequency[rows] * counts[output] - presence[rows]
    return logits


def _output_tokens(metadata: SamplingMetadata, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and token id of every output token of the rows that have a penalty, int64 each."""
    used = ((metadata.repetition_penalties != 1) | (metadata.frequency_penalties != 0)
            | (metadata.presence_penalties != 0)).tolist()
    rows: list[int] = []
    tokens: list[int] = []
    for row, output in enumerate(metadata.output_token_ids):
        if used[row]:
            rows.extend([row] * len(output))
            tokens.extend(output)
    return (torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(tokens, dtype=torch.int64, device=device))


def _prompt_tokens(metadata: SamplingMetadata, repetition: torch.Tensor,
                   vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and token id of every prompt token of the rows with a repetition penalty, int64 each."""
    prompt = metadata.prompt_token_ids
    wanted = (prompt < vocab) & (repetition != 1).unsqueeze(1)
    rows, positions = wanted.nonzero(as_tuple=True)
    return rows, prompt[rows, positions]
