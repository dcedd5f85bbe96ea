"""The buffers that captured steps read: filled on the host in pinned memory, moved by one copy.

Everything is indexed by batch row: request i of a captured step is row i of `DeviceBatch`, and a row that
computes nothing has no tokens. Invariant: the addresses never change; what a fill does not name is padding.

vLLM: `CpuGpuBuffer` in `vllm/v1/utils.py`, the persistent buffers of `vllm/v1/worker/gpu_model_runner.py`.
"""

from __future__ import annotations

import numpy as np
import torch


def _pinned(length: int) -> tuple[torch.Tensor, np.ndarray]:
    """int64 zeros to stage a copy in. torch's caching allocator keeps the block until its copy is done."""
    staged = torch.empty(length, dtype=torch.int64, pin_memory=True)
    host = staged.numpy()
    host.fill(0)
    return staged, host


class DecodeInputs:
    """One token per row, for up to N rows.

    The tokens that the newest step sampled lie right before the ids that come from the host, so one gather
    by `source` takes each row's input from either. Views: `sampled`, `source`, `positions`, `slots` int64 [N],
    `seq_lens` int32 [N].
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        from_host = 4 * num_rows + -(-num_rows // 2)
        whole = torch.zeros(num_rows + from_host, dtype=torch.int64, device=device)
        self.tokens = whole[: 2 * num_rows]
        self.sampled, _, self.source, self.positions, self.slots = whole[: 5 * num_rows].view(5, num_rows)
        self.slots.fill_(-1)
        self.seq_lens = whole[5 * num_rows :].view(torch.int32)[:num_rows]
        self._from_host = whole[num_rows:]

    def fill(
        self, rows: np.ndarray, ids: np.ndarray, source: np.ndarray, positions: np.ndarray, slots: np.ndarray
    ) -> None:
        """Set the given rows, all int64 [R]; make the others padding. `source`: index in `sampled`, -1 for `ids`."""
        n = self.num_rows
        staged, host = _pinned(len(self._from_host))
        host[3 * n : 4 * n] = -1
        host[rows] = ids
        host[n + rows] = np.where(source < 0, n + rows, source)
        host[2 * n + rows] = positions
        host[3 * n + rows] = slots
        host[4 * n :].view(np.int32)[rows] = positions + 1
        self._from_host.copy_(staged, non_blocking=True)


class TokenInputs:
    """Any number of tokens per row: up to T tokens of up to N rows.

    Views: `ids`, `positions`, `slots` int64 [T]; `last` int64 [N], each row's last token; `starts` int32 [N + 1];
    `seq_lens` int32 [N].
    """

    def __init__(self, num_tokens: int, num_rows: int, device: torch.device) -> None:
        self.num_tokens, self.num_rows = num_tokens, num_rows
        self._whole = torch.zeros(3 * num_tokens + 2 * num_rows + 1, dtype=torch.int64, device=device)
        self.ids, self.positions, self.slots = self._whole[: 3 * num_tokens].view(3, num_tokens)
        self.slots.fill_(-1)
        self.last = self._whole[3 * num_tokens :][:num_rows]
        narrow = self._whole[3 * num_tokens + num_rows :].view(torch.int32)
        self.starts, self.seq_lens = narrow[: num_rows + 1], narrow[num_rows + 1 : 2 * num_rows + 1]

    def fill(
        self,
        rows: np.ndarray,
        counts: np.ndarray,
        seq_lens: np.ndarray,
        ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        """Set rows (ascending) with their numbers of tokens and lengths, int64 [R], and the tokens, int64 [.]."""
        t, n, total = self.num_tokens, self.num_rows, len(ids)
        staged, host = _pinned(len(self._whole))
        host[:total] = ids
        host[t : t + total] = positions
        host[2 * t : 3 * t] = -1
        host[2 * t : 2 * t + total] = slots
        by_row = np.zeros(n, np.int64)
        by_row[rows] = counts
        ends = np.cumsum(by_row)
        host[3 * t + rows] = ends[rows] - 1
        narrow = host[3 * t + n :].view(np.int32)
        narrow[1 : n + 1] = ends
        narrow[n + 1 + rows] = seq_lens
        self._whole.copy_(staged, non_blocking=True)
