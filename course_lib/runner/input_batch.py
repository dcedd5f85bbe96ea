"""The running requests as rows of arrays, so that a step is prepared without looping over them.

Each request the runner has been told of has a `RequestState` until it finishes, preempted or not:
its sampling state (generator, output so far) must survive preemption. The running ones also have a
row in `InputBatch`; rows stay dense, a leaving request's row being filled by the last one.

Invariant: row i of every array belongs to `request_ids[i]`, and `rows[request_ids[i]] == i`.

vLLM: `vllm/v1/worker/gpu_input_batch.py`, `block_table.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from course_lib.runner.prompt_logprobs import PendingPromptLogprobs
from course_lib.sampling_params import SamplingParams

# Parameters that are one number per row: name -> (dtype, value that switches it off).
_SCALARS = {
    "temperature": (np.float32, 0.0),
    "top_p": (np.float32, 1.0),
    "top_k": (np.int32, 0),
    "min_p": (np.float32, 0.0),
    "presence_penalty": (np.float32, 0.0),
    "frequency_penalty": (np.float32, 0.0),
    "repetition_penalty": (np.float32, 1.0),
}


@dataclass(slots=True)
class RequestState:
    """What the runner remembers of a request until it is finished."""

    request_id: str
    sampling_params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None  # only for a request with a seed
    pending_prompt_logprobs: PendingPromptLogprobs | None = None
    error: str | None = None  # what the request's own logits processors raised, if they did


def slot_mapping(
    block_table: np.ndarray, token_rows: np.ndarray, positions: np.ndarray, block_size: int
) -> np.ndarray:
    """Where in the paged cache each token's key and value go: block id * block size + offset in the block.

    Args:
        block_table: int32 [rows, blocks]; entry [r, i] holds positions i * BS to (i + 1) * BS - 1 of row r.
        token_rows: int64 [T], the table row that each token belongs to.
        positions: int64 [T], each token's position in its request.
        block_size: tokens per block (BS).

    Returns:
        int64 [T]. All layers use the same slots, each in its own cache.

    vLLM: `vllm/v1/worker/block_table.py` (`compute_slot_mapping`).
    """
    # int64 before it is multiplied: the slots of a large cache do not fit the table's int32.
    block_ids = block_table[token_rows, positions // block_size].astype(np.int64)
    return block_ids * block_size + positions % block_size


class InputBatch:
    """Args:
    max_num_seqs: rows.
    max_model_len: token columns.
    block_size: tokens per block.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self.request_ids: list[str] = []
        self.rows: dict[str, int] = {}
        self.states: list[RequestState] = []
        self.token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_computed = np.zeros(max_num_seqs, np.int32)
        self.block_table = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int32)
        self.scalars = {name: np.zeros(max_num_seqs, dtype) for name, (dtype, _) in _SCALARS.items()}
        self.version = 0  # changes whenever a row changes its owner

    def add(self, state: RequestState, block_ids: list[int], num_computed: int) -> None:
        """Give `state` the next row."""
        row = len(self.request_ids)
        self.request_ids.append(state.request_id)
        self.states.append(state)
        self.rows[state.request_id] = row
        tokens = state.prompt_token_ids + state.output_token_ids
        self.token_ids[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_computed[row] = num_computed
        self.num_blocks[row] = 0
        self.append_blocks(row, block_ids)
        for name, column in self.scalars.items():
            column[row] = getattr(state.sampling_params, name)
        self.version += 1

    def remove(self, request_id: str) -> None:
        """Free the row of `request_id`, if it has one, moving the last row into the hole."""
        row = self.rows.pop(request_id, None)
        if row is None:
            return
        last = len(self.request_ids) - 1
        if row != last:
            moved = self.request_ids[last]
            self.request_ids[row], self.states[row] = moved, self.states[last]
            self.rows[moved] = row
            tokens, blocks = self.num_tokens[last], self.num_blocks[last]
            self.token_ids[row, :tokens] = self.token_ids[last, :tokens]
            self.block_table[row, :blocks] = self.block_table[last, :blocks]
            for column in (self.num_tokens, self.num_computed, self.num_blocks, *self.scalars.values()):
                column[row] = column[last]
        self.request_ids.pop()
        self.states.pop()
        self.version += 1

    def clear(self) -> None:
        """Empty all rows."""
        self.request_ids, self.rows, self.states = [], {}, []
        self.version += 1

    def append_blocks(self, row: int, block_ids: list[int]) -> None:
        """Extend a row's block table."""
        count = self.num_blocks[row]
        self.block_table[row, count : count + len(block_ids)] = block_ids
        self.num_blocks[row] += len(block_ids)

    def write_tokens(self, row: int, start: int, token_ids: list[int]) -> None:
        """Enter tokens of a row from position `start` on that another runner has sampled."""
        end = start + len(token_ids)
        self.token_ids[row, start:end] = token_ids
        self.num_tokens[row] = max(self.num_tokens[row], end)

    def append_tokens(self, rows: np.ndarray, token_ids: np.ndarray) -> None:
        """Append one sampled token to each of `rows`. token_ids: int [len(rows)]."""
        lengths = self.num_tokens[rows]
        # A request at max_model_len is about to be finished by the scheduler: it has no column left.
        fits = lengths < self.token_ids.shape[1]
        self.token_ids[rows[fits], lengths[fits]] = token_ids[fits]
        self.num_tokens[rows] += 1
        for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
            self.states[row].output_token_ids.append(token_id)
