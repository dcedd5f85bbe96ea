"""One step's attention problem: which token belongs to which request, and where its KV lives.

The batch is flat: all new tokens of all requests one after another, with `query_start_loc` marking
the borders. A request with one new token and one with a thousand are the same thing.

vLLM: `vllm/v1/attention/backend.py` (`CommonAttentionMetadata`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class AttentionMetadata:
    """Shapes: R requests, T new tokens, M blocks in the longest block table.

    `query_start_loc_host` and `seq_lens_host` repeat two device arrays on the host, where planning
    happens; `plan` is whatever the backend prepared once for all layers.
    """

    query_start_loc: torch.Tensor  # int32 [R + 1]
    seq_lens: torch.Tensor  # int32 [R]: computed plus new tokens
    block_table: torch.Tensor  # int32 [R, M]
    slot_mapping: torch.Tensor  # int64 [T]: block id * block size + offset
    query_start_loc_host: np.ndarray
    seq_lens_host: np.ndarray
    max_query_len: int
    max_seq_len: int
    plan: Any = None
