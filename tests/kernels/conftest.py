"""Runs every kernel test compiled on a GPU when there is one, else in Triton's interpreter on the CPU.

Triton chooses between compiler and interpreter when a function is decorated, its own library included,
so the choice has to be made before `triton` is first imported. Another test may have imported it by
then. Therefore, for the interpreter, tests in this folder see their own copy of the Python modules
`triton` and `kernels.triton`, imported under TRITON_INTERPRET=1; outside the folder's tests,
`sys.modules` and the environment are as they were.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
DEVICE = torch.device("cuda" if COMPILED else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if COMPILED else [])
# Against a float64 reference on the same, already rounded inputs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _is_triton(name: str) -> bool:
    # The C extension can be loaded once only, and both copies share it.
    in_triton = name == "triton" or name.startswith("triton.")
    return (in_triton and not name.startswith("triton._C")) or name.startswith("kernels.triton")


def _take_triton_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if _is_triton(name)}


@pytest.fixture(scope="session")
def _interpreted_modules() -> dict[str, ModuleType]:
    """The modules `triton` and `kernels.triton`, decorated for the interpreter; not in sys.modules."""
    others = _take_triton_modules()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("kernels.triton")
    mine = _take_triton_modules()
    sys.modules.update(others)
    return mine


@pytest.fixture
def triton_kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The package `kernels.triton`, ready to run on `device`."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no wheel for this platform")
    if COMPILED:
        yield importlib.import_module("kernels.triton")
        return
    mine = request.getfixturevalue("_interpreted_modules")
    others = _take_triton_modules()
    sys.modules.update(mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield mine["kernels.triton"]
    mine.update(_take_triton_modules())
    sys.modules.update(others)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass
class PagedBatch:
    """A ragged batch in a paged cache in which every slot a kernel must not read holds NaN."""

    query: Tensor  # [T, H, D], a view into a fused and padded qkv tensor
    k_cache: Tensor  # [NB, BS, Hkv, D]
    v_cache: Tensor
    block_table: Tensor  # int32 [B, MB]
    seq_lens: Tensor  # int32 [B]
    query_start_loc: Tensor  # int32 [B+1]
    scale: float
    keys: list[Tensor]  # per request, [seq_len, Hkv, D]: what the cache holds, in order
    values: list[Tensor]
    sliding_window: int | None

    @property
    def query_lens(self) -> list[int]:
        return self.query_start_loc.diff().tolist()

    def _caches(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(t.to(dtype or t.dtype) for t in (self.query, self.k_cache, self.v_cache))

    def decode(self, kernels: ModuleType, dtype: torch.dtype | None = None, **options) -> Tensor:
        """Attention of each request's one query; the batch must have query_lens of 1."""
        return kernels.paged_attention_decode(
            *self._caches(dtype), self.block_table, self.seq_lens, self.scale,
            sliding_window=self.sliding_window, **options,
        )  # fmt: skip

    def varlen(self, kernels: ModuleType, dtype: torch.dtype | None = None, **options) -> Tensor:
        options.setdefault("max_query_len", max([1, *self.query_lens]))
        return kernels.paged_attention_varlen(
            *self._caches(dtype), self.block_table, self.seq_lens, self.query_start_loc, self.scale,
            sliding_window=self.sliding_window, **options,
        )  # fmt: skip


def _empty_cache(layout: str, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    nan = float("nan")
    if layout == "offsets_first":
        return tuple(
            torch.full((num_blocks, block_size, num_kv_heads, head_dim), nan, dtype=dtype) for _ in range(2)
        )
    if layout == "heads_first":  # as the CPU backend stores it
        return tuple(
            torch.full((num_blocks, num_kv_heads, block_size, head_dim), nan, dtype=dtype).transpose(1, 2)
            for _ in range(2)
        )
    if layout == "fused":  # K with room for V behind it in every block, and V elsewhere: unequal strides
        fused = torch.full((num_blocks, 2, block_size, num_kv_heads, head_dim + 8), nan, dtype=dtype)
        v_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), nan, dtype=dtype)
        return fused[:, 1, ..., :head_dim], v_cache
    raise ValueError(layout)


def make_paged_batch(
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "offsets_first",
    sliding_window: int | None = None,
    seed: int = 0,
) -> PagedBatch:
    """Requests with random keys in randomly scattered blocks; NaN wherever no query may look.

    That is: blocks nobody owns, slots behind the end of a sequence, and positions that have left every
    query's window. Table entries that must not be used point to block 0, which is all NaN.
    """
    query_lens = [1] * len(seq_lens) if query_lens is None else query_lens
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width = max([1, *(-(-length // block_size) for length in seq_lens)]) + 1
    needed = sum(-(-length // block_size) for length in seq_lens)
    num_blocks = needed + 3
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    k_cache, v_cache = _empty_cache(layout, num_blocks, block_size, num_kv_heads, head_dim, dtype)
    block_table = torch.zeros(len(seq_lens), width, dtype=torch.int32)
    keys, values = [], []
    for request, (seq_len, query_len) in enumerate(zip(seq_lens, query_lens, strict=True)):
        keys.append(randn(seq_len, num_kv_heads, head_dim))
        values.append(randn(seq_len, num_kv_heads, head_dim))
        first_seen = 0
        if sliding_window is not None:
            first_seen = max(0, seq_len - query_len - sliding_window + 1)
        for position in range(first_seen, seq_len):
            index = position // block_size
            if block_table[request, index] == 0:
                block_table[request, index] = free.pop()
            block = int(block_table[request, index])
            k_cache[block, position % block_size] = keys[-1][position]
            v_cache[block, position % block_size] = values[-1][position]

    num_tokens = sum(query_lens)
    # Query heads with a gap behind each, so that no stride is the product of the sizes right of it.
    qkv = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim + 8)
    qkv[..., head_dim:] = float("nan")
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return PagedBatch(
        query=qkv.to(DEVICE)[:, :num_heads, :head_dim],
        k_cache=_to_device(k_cache),
        v_cache=_to_device(v_cache),
        block_table=block_table.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        query_start_loc=starts.to(DEVICE),
        scale=head_dim**-0.5,
        keys=[k.to(DEVICE) for k in keys],
        values=[v.to(DEVICE) for v in values],
        sliding_window=sliding_window,
    )


def _to_device(cache: Tensor) -> Tensor:
    """Copy to the device with the same strides (`.to` would drop the gaps of a view)."""
    if cache.device == DEVICE:
        return cache
    size = sum((n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True)) + 1
    moved = torch.full((size,), float("nan"), dtype=cache.dtype, device=DEVICE)
    return moved.as_strided(cache.shape, cache.stride()).copy_(cache)


@pytest.fixture
def paged_batch() -> Callable[..., PagedBatch]:
    return make_paged_batch


@pytest.fixture
def assert_matches() -> Callable[[Tensor, Tensor], None]:
    """Compare a kernel's result with the float64 reference, at the tolerance of the kernel's dtype."""

    def check(actual: Tensor, expected: Tensor) -> None:
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)

    return check
