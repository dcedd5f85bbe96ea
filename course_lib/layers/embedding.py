"""The token embedding table, which a tied language-model head multiplies by.

vLLM: `model_executor/layers/vocab_parallel_embedding.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.layers.linear import frozen


class TokenEmbedding(nn.Module):
    """Rows of `weight` [vocab, hidden]: ids [T] (int32 or int64) -> [T, hidden], a new tensor."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.weight = frozen(vocab_size, hidden_size, dtype=dtype, device=device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(input_ids, self.weight)
