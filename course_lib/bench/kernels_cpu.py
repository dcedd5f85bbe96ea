"""The CPU's two costs, one by one, at the course model's shapes: paged attention in torch, and the linear layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from course_lib.attention.backend import make_backend
from course_lib.attention.metadata import AttentionMetadata
from course_lib.bench.ceilings import seconds_per_call
from course_lib.bench.kernels import BLOCK_SIZE, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, VOCAB
from course_lib.bench.ledger import Row
from course_lib.layers.cpu_matmul import can_pack, pack
from course_lib.layers.linear import Linear

_DECODE = [(1, 1024), (8, 512), (32, 512), (64, 256), (64, 1024)]
_PREFILL = [(1, 512), (1, 2048)]
_ROWS = (1, 2, 8, 64, 256)
_SHAPES = {"qkv": (HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), "gate and up": (HIDDEN, 2 * INTERMEDIATE),
           "down": (INTERMEDIATE, HIDDEN), "LM head": (HIDDEN, VOCAB)}  # fmt: skip
_CPU = torch.device("cpu")
# More weight than the last-level cache holds, as a model's layers are together.
_WEIGHT_BYTES = 64 << 20


class CpuKernels:
    """Args: `copy` GB/s and `product` GFLOP/s of this machine, and values per row."""

    def __init__(self, dtype: torch.dtype, copy: float, product: float, repeats: int) -> None:
        self.dtype, self.copy, self.product, self.repeats = dtype, copy, product, repeats
        self.suffix = str(dtype).removeprefix("torch.")

    def rows(self) -> list[Row]:
        return [*self._attention(), *self._linears()]

    def _seconds(self, function: Callable[[], object]) -> list[float]:
        return seconds_per_call(function, _CPU, self.repeats)

    def _attention(self) -> Iterator[Row]:
        for requests, length in _DECODE:
            seconds = self._attend(requests, length, 1)
            moved = 2 * requests * length * KV_HEADS * HEAD_DIM * self.dtype.itemsize
            yield Row(f"{requests} x {length}", "GB/s", [moved / s / 1e9 for s in seconds],
                      group=f"decode attention, {self.suffix}", limit=self.copy)  # fmt: skip
        for requests, length in _PREFILL:
            seconds = self._attend(requests, length, length)
            operations = 4 * requests * HEADS * HEAD_DIM * length * length / 2  # causal: half of the square
            yield Row(f"{requests} x {length}", "GFLOP/s", [operations / s / 1e9 for s in seconds],
                      group=f"prefill attention, {self.suffix}", limit=self.product)  # fmt: skip

    def _attend(self, requests: int, length: int, query_len: int) -> list[float]:
        """Seconds of one layer: cache write and attention, with the step's plan already made."""
        backend = make_backend("torch", block_size=BLOCK_SIZE, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                               dtype=self.dtype, device=_CPU)  # fmt: skip
        blocks_each = -(-length // BLOCK_SIZE)
        [cache] = backend.allocate_cache(1, requests * blocks_each)
        for part in cache:
            part.copy_(torch.randn(part.shape))
        table = torch.randperm(requests * blocks_each).view(requests, -1).int()
        positions = np.tile(np.arange(length - query_len, length), requests)
        rows = np.repeat(np.arange(requests), query_len)
        slots = table.numpy()[rows, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        starts = np.arange(requests + 1) * query_len
        lengths = np.full(requests, length, np.int32)
        metadata = AttentionMetadata(
            query_start_loc=torch.from_numpy(starts).int(), seq_lens=torch.from_numpy(lengths), block_table=table,
            slot_mapping=torch.from_numpy(slots), query_start_loc_host=starts, seq_lens_host=lengths,
            max_query_len=query_len, max_seq_len=length,
        )  # fmt: skip
        metadata.plan = backend.plan(metadata)
        query = torch.randn(requests * query_len, HEADS, HEAD_DIM).to(self.dtype)
        key, value = (torch.randn(requests * query_len, KV_HEADS, HEAD_DIM).to(self.dtype) for _ in range(2))
        return self._seconds(lambda: backend.forward(query, key, value, cache, metadata, HEAD_DIM**-0.5, None))

    def _linears(self) -> Iterator[Row]:
        """As the engine multiplies, packed where it packs: few rows in GB/s of reading the weight, many in GFLOP/s."""
        packs = can_pack(self.dtype, _CPU)
        for name, (inputs, outputs) in _SHAPES.items():
            copies = max(1, _WEIGHT_BYTES // (inputs * outputs * self.dtype.itemsize))
            layers = [self._linear(inputs, outputs, packs) for _ in range(copies)]
            weight_bytes = inputs * outputs * (2 if packs else self.dtype.itemsize)  # packed float32 is float16
            for rows in _ROWS:
                x = torch.randn(rows, inputs).to(self.dtype)
                seconds = [s / copies for s in self._seconds(lambda: [layer(x) for layer in layers])]
                group = f"linear {name}, {self.suffix}{' packed' if packs else ''}"
                if rows <= 8:
                    values = [weight_bytes / s / 1e9 for s in seconds]
                    yield Row(f"{rows} rows", "GB/s", values, group=group, limit=self.copy)
                else:
                    values = [2 * rows * inputs * outputs / s / 1e9 for s in seconds]
                    yield Row(f"{rows} rows", "GFLOP/s", values, group=group, limit=self.product)

    def _linear(self, inputs: int, outputs: int, packs: bool) -> Linear:
        layer = Linear(inputs, outputs, bias=False, dtype=self.dtype, device=_CPU)
        layer.weight.copy_(torch.randn(outputs, inputs).half())  # as models are stored
        if packs:
            layer.weight = nn.Parameter(pack(layer.weight), requires_grad=False)
        return layer
