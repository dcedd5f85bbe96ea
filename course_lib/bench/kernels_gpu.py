"""The Triton kernels, one by one, at the course model's shapes.

Bytes are those that a kernel must move (each input once, each output once), so a figure above the copy bandwidth means
that the data stayed in the L2 cache. Weights and attention caches are larger than the L2, or rotated until they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.bench.ceilings import seconds_per_call, wall_seconds_per_call
from course_lib.bench.kernels import BLOCK_SIZE, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB
from course_lib.bench.ledger import Row
from course_lib.sampling.metadata import SamplingMetadata
from course_lib.sampling.sampler import Sampler

_DECODE = [(1, 1024), (1, 4096), (1, 16384), (8, 4096), (32, 1024), (32, 4096), (32, 8192), (32, 16384),
           (64, 4096), (128, 4096), (256, 1024), (256, 4096), (256, 16384)]  # fmt: skip
_PREFILL = [(8, 1024), (4, 2048), (1, 8192)]
_TOKENS = (256, 65536)  # of a decode step, which stays in the L2 cache; and enough to stream
_SAMPLED = (64, 256)


class GpuKernels:
    """Args: `copy` GB/s and `product` TFLOP/s of this machine, and values per row."""

    def __init__(self, device: torch.device, dtype: torch.dtype, copy: float, product: float, repeats: int) -> None:
        import kernels.triton

        self.kernels = kernels.triton
        self.device, self.dtype, self.repeats = device, dtype, repeats
        self.copy, self.product = copy, product
        self.suffix = str(dtype).removeprefix("torch.")

    def rows(self) -> list[Row]:
        parts = (self._decode, self._prefill, self._cache_writes, self._small_ops, self._few_rows, self._sampling)
        rows: list[Row] = []
        for part in parts:
            rows += part()
            torch.cuda.empty_cache()
        return rows

    def _randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def _seconds(self, function: Callable[[], object]) -> list[float]:
        return seconds_per_call(function, self.device, self.repeats)

    def _moved(self, group: str, name: str, num_bytes: int, function: Callable[[], object]) -> Row:
        values = [num_bytes / s / 1e9 for s in self._seconds(function)]
        microseconds = num_bytes / sorted(values)[len(values) // 2] / 1e3
        details = {"bytes": num_bytes, "us": round(microseconds, 2)}
        return Row(name, "GB/s", values, group=f"{group}, {self.suffix}", limit=self.copy, details=details)

    def _cache(self, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As the backend stores it: heads before offsets."""
        k, v = (self._randn(num_blocks, KV_HEADS, BLOCK_SIZE, HEAD_DIM).transpose(1, 2) for _ in range(2))
        return k, v

    def _tables(self, requests: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(block table with scattered blocks, lengths)."""
        table = torch.randperm(requests * length // BLOCK_SIZE, device=self.device).view(requests, -1).int()
        return table, torch.full((requests,), length, dtype=torch.int32, device=self.device)

    def _decode(self) -> Iterator[Row]:
        for requests, length in _DECODE:
            k, v = self._cache(requests * length // BLOCK_SIZE)
            table, lengths = self._tables(requests, length)
            query = self._randn(requests, HEADS, HEAD_DIM)
            moved = 2 * requests * length * KV_HEADS * HEAD_DIM * self.dtype.itemsize
            yield self._moved(
                "decode attention", f"{requests} x {length}", moved,
                lambda: self.kernels.paged_attention_decode(
                    query, k, v, table, lengths, HEAD_DIM**-0.5, max_seq_len=length
                ),
            )  # fmt: skip

    def _prefill(self) -> Iterator[Row]:
        for requests, length in _PREFILL:
            tokens = requests * length
            k, v = self._cache(tokens // BLOCK_SIZE)
            table, lengths = self._tables(requests, length)
            starts = torch.arange(requests + 1, dtype=torch.int32, device=self.device) * length
            query = self._randn(tokens, HEADS, HEAD_DIM)
            dense = [self._randn(requests, HEADS, length, HEAD_DIM) for _ in range(3)]
            operations = 4 * requests * HEADS * HEAD_DIM * length * length / 2  # causal: half of the square
            ours = self._seconds(
                lambda: self.kernels.paged_attention_varlen(
                    query, k, v, table, lengths, starts, HEAD_DIM**-0.5, max_query_len=length
                )
            )
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                flash = self._seconds(lambda: F.scaled_dot_product_attention(*dense, is_causal=True))
            group = f"prefill attention, {self.suffix}"
            for name, seconds in ((f"{requests} x {length}", ours), (f"torch flash {requests} x {length}", flash)):
                values = [operations / s / 1e12 for s in seconds]
                yield Row(name, "TFLOP/s", values, group=group, limit=self.product)

    def _cache_writes(self) -> Iterator[Row]:
        heads = HEADS + 2 * KV_HEADS
        for tokens in _TOKENS:
            k, v = self._cache(tokens // BLOCK_SIZE)
            slots = torch.randperm(tokens, device=self.device)
            qkv = self._randn(tokens, heads * HEAD_DIM)
            key, value = qkv.view(tokens, heads, HEAD_DIM)[:, HEADS:].chunk(2, dim=1)
            moved = 2 * key.nbytes + 2 * value.nbytes
            yield self._moved("cache write", f"{tokens} tokens", moved,
                              lambda: self.kernels.reshape_and_cache(key, value, k, v, slots))  # fmt: skip
            table = self._randn(8192, HEAD_DIM)
            positions = torch.arange(tokens, device=self.device) % 8192
            yield self._moved("rotary + cache write", f"{tokens} tokens", 2 * qkv.nbytes,
                              lambda: self.kernels.rotary_and_cache(qkv, table, positions, k, v, slots))  # fmt: skip

    def _small_ops(self) -> Iterator[Row]:
        weight = self._randn(HIDDEN)
        for tokens in _TOKENS:
            x, residual = self._randn(tokens, HIDDEN), self._randn(tokens, HIDDEN)
            yield self._moved("residual + RMSNorm", f"{tokens} tokens", 4 * x.nbytes,
                              lambda: self.kernels.rms_norm(x, weight, 1e-5, residual))  # fmt: skip
            gate_up = self._randn(tokens, 2 * INTERMEDIATE)
            yield self._moved("SwiGLU", f"{tokens} tokens", gate_up.nbytes * 3 // 2,
                              lambda: self.kernels.silu_and_mul(gate_up))  # fmt: skip

    def _few_rows(self) -> Iterator[Row]:
        weights = self._randn(LAYERS, 2 * INTERMEDIATE, HIDDEN)  # one per layer: more than the L2 cache holds
        for rows in (1, 4):
            x = self._randn(rows, HIDDEN)
            for name, product in (("", self.kernels.few_rows_linear), ("cuBLAS ", F.linear)):
                yield self._moved("few-row linear, gate and up", f"{name}{rows} rows", weights.nbytes,
                                  lambda: [product(x, weight) for weight in weights])  # fmt: skip

    def _sampling(self) -> Iterator[Row]:
        """Greedy as it is in the graphs; random sampling as the runner calls it, launches included."""
        sampler = Sampler()
        for rows in _SAMPLED:
            logits = self._randn(rows, VOCAB)
            yield self._moved("sampling", f"greedy, {rows} rows", logits.nbytes, lambda: logits.argmax(dim=-1))
            for name, top_p in (("temperature", None), ("top-p 0.9", 0.9)):
                metadata = SamplingMetadata(
                    torch.full((rows,), 0.8, device=self.device), all_greedy=False, all_random=True,
                    top_p=None if top_p is None else torch.full((rows,), top_p, device=self.device),
                    default_generator=torch.Generator(self.device).manual_seed(0),
                )  # fmt: skip
                seconds = wall_seconds_per_call(lambda: sampler(logits, metadata), self.repeats)
                yield Row(f"{name}, {rows} rows", "ms", [1e3 * s for s in seconds], group=f"sampling, {self.suffix}")
