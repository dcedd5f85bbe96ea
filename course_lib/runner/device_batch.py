"""The rows of `InputBatch`, plus what a step on a GPU needs so that it need not wait for the one before.

Owns the list of block table cells that the device has not been told of: its copy of the table stays where it is
and receives differences. And it knows which rows' newest token exists on the device only.

Invariant: after `take_table_changes` has been applied, the device's table equals `block_table` in every cell
that a row owns; `in_flight_index[row]` is the place of row's newest token among the tokens sampled by the
newest step, or -1 when the token is in `token_ids`.

vLLM: `vllm/v1/worker/block_table.py`, `gpu_input_batch.py` (`prev_req_id_to_index`).
"""

from __future__ import annotations

import numpy as np

from course_lib.runner.input_batch import InputBatch, RequestState
from course_lib.sampling_params import GREEDY_TEMPERATURE, SamplingParams


class DeviceBatch(InputBatch):
    """Args: as `InputBatch`."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        super().__init__(max_num_seqs, max_model_len, block_size)
        self.in_flight_index = np.full(max_num_seqs, -1, np.int64)
        self.takes_argmax = np.zeros(max_num_seqs, bool)  # rows whose token is simply the most likely one
        self.wants_prompt_logprobs = np.zeros(max_num_seqs, bool)  # or wanted them, and has them
        self._changed: list[tuple[int, int, int]] = []  # row, first column, end column

    def add(self, state: RequestState, block_ids: list[int], num_computed: int) -> None:
        super().add(state, block_ids, num_computed)
        row = self.rows[state.request_id]
        self.in_flight_index[row] = -1
        self.takes_argmax[row] = takes_argmax(state.sampling_params)
        self.wants_prompt_logprobs[row] = state.pending_prompt_logprobs is not None

    def remove(self, request_id: str) -> None:
        row, last = self.rows.get(request_id), len(self.request_ids) - 1
        super().remove(request_id)
        if row is not None and row != last:
            for column in (self.in_flight_index, self.takes_argmax, self.wants_prompt_logprobs):
                column[row] = column[last]
            self._changed.append((row, 0, int(self.num_blocks[row])))

    def clear(self) -> None:
        super().clear()
        self.in_flight_index.fill(-1)
        self._changed.clear()

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        first = int(self.num_blocks[row])
        super().append_blocks(row, block_ids)
        self._changed.append((row, first, first + len(block_ids)))

    def take_table_changes(self) -> np.ndarray | None:
        """int64 [2, n]: cells of the flattened table, and what is in them now; None without changes."""
        if not self._changed:
            return None
        width = self.block_table.shape[1]
        cells = np.concatenate(
            [np.arange(row * width + first, row * width + end) for row, first, end in self._changed]
        )
        self._changed.clear()
        return np.stack((cells, self.block_table.reshape(-1)[cells]))


def takes_argmax(params: SamplingParams) -> bool:
    """Whether a request's next token is the argmax of its unmodified logits, and nothing else is asked."""
    return (
        params.temperature < GREEDY_TEMPERATURE
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and params.min_tokens == 0
        and params.logprobs is None
        and not (params.bad_words or params.logit_bias or params.allowed_token_ids or params.logits_processors)
    )
