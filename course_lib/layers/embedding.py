"""The token embedding table and the language-model head, shared out by rows of the vocabulary.

A look-up finds the tokens that a rank holds, leaves zero for all others, and adds up over the ranks; logits are
computed for a rank's own rows and gathered. A tied head multiplies by the table's own rows. Invariant: every rank
holds equally many rows, those behind the vocabulary's end are zero, and no logit of theirs is given out.

vLLM: `model_executor/layers/vocab_parallel_embedding.py`, `logits_processor.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.layers.linear import Linear, frozen
from course_lib.layers.weights import ShardedModule, WeightSlot
from course_lib.parallel.group import Group

_ROWS_MULTIPLE = 16  # of a share's rows: what tensor cores and the 4-bit product of few rows want


class VocabShare:
    """Which rows of a table with `vocab_size` rows this rank of `group` holds: `num_rows` from `start` on, of which
    `num_tokens` are tokens and the rest is padding."""

    def __init__(self, vocab_size: int, group: Group) -> None:
        self.group = group
        self.vocab_size = vocab_size
        self.num_rows = vocab_size
        if group.size > 1:
            self.num_rows = -(-vocab_size // (group.size * _ROWS_MULTIPLE)) * _ROWS_MULTIPLE
        self.start = min(group.rank * self.num_rows, vocab_size)
        self.num_tokens = min(self.num_rows, vocab_size - self.start)

    @torch.no_grad()
    def clear_padding(self, table: nn.Parameter) -> None:
        """table [num_rows, ...]: zero the rows that no checkpoint tensor will fill."""
        table[self.num_tokens :].zero_()

    def slot(self, table: nn.Parameter) -> WeightSlot:
        """Where the checkpoint's [vocab_size, hidden] tensor goes in `table` [num_rows, hidden]."""
        source = (slice(self.start, self.start + self.num_tokens),)
        return WeightSlot(table, slice(0, self.num_tokens), (self.vocab_size, table.shape[1]), source)

    def gather_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's logits [N, num_rows] -> all [N, vocab_size], contiguous, on every rank."""
        if self.group.size == 1:
            return logits
        return self.group.all_gather(logits, dim=1)[:, : self.vocab_size].contiguous()


class TokenEmbedding(ShardedModule):
    """ids [T] (int32 or int64) -> [T, hidden], a new tensor, on every rank; weight [share of vocab, hidden]."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.vocab = VocabShare(vocab_size, group)
        self.weight = frozen(self.vocab.num_rows, hidden_size, dtype=dtype, device=device)
        self.vocab.clear_padding(self.weight)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        group = self.vocab.group
        if group.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self.vocab.start
        absent = (rows < 0) | (rows >= self.vocab.num_tokens)
        found = F.embedding(rows.masked_fill_(absent, 0), self.weight)
        return group.all_reduce(found.masked_fill_(absent[:, None], 0))

    def shards(self) -> Iterator[tuple[str, WeightSlot]]:
        yield "weight", self.vocab.slot(self.weight)


class LMHead(Linear, ShardedModule):
    """hidden [N, hidden] -> logits [N, vocab], on every rank; weight [share of vocab, hidden]."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        group: Group,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        vocab = VocabShare(vocab_size, group)
        super().__init__(hidden_size, vocab.num_rows, bias=False, dtype=dtype, device=device)
        self.vocab = vocab
        vocab.clear_padding(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.vocab.gather_logits(super().forward(hidden))

    def shards(self) -> Iterator[tuple[str, WeightSlot]]:
        yield "weight", self.vocab.slot(self.weight)
