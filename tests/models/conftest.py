"""Run a model on whole sequences through the real attention layer and paged torch backend.

A stand-in for the runner: blocks are dealt out in a shuffled order, and a sequence may be fed in
chunks, so that a test of a model also meets a cache that is not contiguous. Of a model on several ranks each
rank has a run of its own, which hands on to the next pipeline stage what that needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from course_lib.attention.backend import make_backend
from course_lib.attention.metadata import AttentionMetadata
from course_lib.layers.cpu_matmul import can_pack
from course_lib.layers.fused import packing_kernels
from course_lib.models.causal_lm import CausalLM, IntermediateTensors
from kernels.cpu import compiled_kernels

BLOCK_SIZE = 4


class PagedRun:
    """A batch of sequences and their cache. `advance` feeds some tokens of each and returns logits, on the last
    stage of a pipeline; nothing on others."""

    def __init__(self, model: CausalLM, sequences: Sequence[Sequence[int]], block_size: int = BLOCK_SIZE):
        self.model, self.block_size = model, block_size
        self.sequences = [torch.tensor(tokens) for tokens in sequences]
        self.computed = np.zeros(len(sequences), np.int64)
        layers = model.attention_layers()
        weight = next(model.parameters())
        self.backend = make_backend(
            "torch",
            block_size=block_size,
            num_kv_heads=layers[0].num_kv_heads,
            head_dim=layers[0].head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
        blocks_each = max(-(-len(tokens) // block_size) for tokens in sequences)
        num_blocks = blocks_each * len(sequences)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self.block_table = order.view(len(sequences), blocks_each).int()
        caches = self.backend.allocate_cache(len(layers), num_blocks)
        for layer, cache in zip(layers, caches, strict=True):
            layer.bind(self.backend, cache)

    @torch.inference_mode()
    def advance(self, num_new: Sequence[int]) -> list[torch.Tensor]:
        """Feed `num_new[i]` tokens of sequence i; logits [num_new[i], vocab] of each."""
        starts = np.concatenate(([0], np.cumsum(num_new)))
        spans = [range(done, done + new) for done, new in zip(self.computed.tolist(), num_new, strict=True)]
        positions = torch.tensor([position for span in spans for position in span])
        rows = torch.tensor([row for row, span in enumerate(spans) for _ in span])
        pairs = zip(self.sequences, spans, strict=True)
        tokens = torch.cat([sequence[span.start : span.stop] for sequence, span in pairs])
        blocks = self.block_table[rows, positions // self.block_size].long()
        seq_lens = self.computed + np.asarray(num_new)
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts).int(),
            seq_lens=torch.from_numpy(seq_lens).int(),
            block_table=self.block_table,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            query_start_loc_host=starts,
            seq_lens_host=seq_lens,
            max_query_len=max(num_new),
            max_seq_len=int(seq_lens.max()),
        )
        metadata.plan = self.backend.plan(metadata)
        self.computed = seq_lens
        hidden = self._forward(tokens, positions, metadata)
        if hidden is None:
            return []
        return list(self.model.compute_logits(hidden).split(list(num_new)))

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor | None:
        parallel, pipeline = self.model.parallel, self.model.parallel.pipeline
        received = None
        if not parallel.is_first_stage:
            norm = self.model.model.layers[self.model.model.stage.start].input_layernorm.weight
            shape, source = (len(tokens), len(norm)), pipeline.rank - 1
            received = IntermediateTensors(*(pipeline.receive(shape, norm.dtype, source) for _ in range(2)))
        out = self.model(None if received else tokens, positions, metadata, intermediate=received)
        if parallel.is_last_stage:
            return out
        pipeline.send(out.hidden, pipeline.rank + 1)
        pipeline.send(out.residual, pipeline.rank + 1)
        return None

    def all_logits(self) -> list[torch.Tensor]:
        """Every sequence in one go."""
        return self.advance([len(tokens) for tokens in self.sequences])


@pytest.fixture
def paged_run() -> type[PagedRun]:
    return PagedRun


@pytest.fixture(params=["own product", "oneDNN"])
def packed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two libraries that may multiply packed bfloat16, if this processor can."""
    if request.param == "own product":
        if packing_kernels(torch.bfloat16) is None:
            pytest.skip("no packed product of our own for bfloat16 on this processor")
    elif compiled_kernels() is not None:
        monkeypatch.setattr(compiled_kernels(), "PACKS_BFLOAT16", False)
    if not can_pack(torch.bfloat16, torch.device("cpu")):
        pytest.skip("oneDNN packs nothing on this processor")
    return request.param


@pytest.fixture
def unpacked_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without our packed product of float32."""
    if compiled_kernels() is not None:
        monkeypatch.setattr(compiled_kernels(), "PACKS_FLOAT32", False)
