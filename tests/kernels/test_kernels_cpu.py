"""The compiled CPU kernels against `kernels.reference`, and what is told where they cannot be had."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_lib.bootstrap.places import REPO_ROOT
from kernels import reference
from kernels.cpu import build, compiled_kernels

ops = compiled_kernels()
needs_kernels = pytest.mark.skipif(ops is None, reason="not compiled: python3 -m kernels.cpu.build")
each_number = pytest.mark.parametrize("number", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TOLERANCE = {torch.float32: dict(atol=2e-6, rtol=2e-6), torch.bfloat16: dict(atol=1e-2, rtol=1e-2)}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), **TOLERANCE[found.dtype])


@needs_kernels
@each_number
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 7), (200, 576), (0, 16)])
def test_norms_and_activations(number: torch.dtype, rows: int, size: int) -> None:
    x, residual, weight = torch.randn(rows, size), 3 * torch.randn(rows, size), torch.randn(size)
    x, residual, weight = x.to(number), residual.to(number), weight.to(number)
    near(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x.double(), weight.double(), 1e-5))
    ours, theirs = x.clone(), x.clone()
    near(ops.rms_norm(ours, weight, 1e-5, residual), reference.rms_norm(theirs, weight, 1e-5, residual))
    assert torch.equal(ours, theirs), "the sum is rounded, and left in x"
    gate_up = (20 * torch.randn(rows, 2 * size)).to(number)
    near(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up.double()))


@needs_kernels
def test_extreme_gates() -> None:
    gates = torch.tensor([0.0, -0.0, 90.0, -90.0, 1e30, -1e30, float("inf"), float("-inf"), float("nan")])
    found = ops.silu_and_mul(torch.cat((gates, torch.ones(9)))[None])[0]
    assert found[:2].tolist() == [0, 0] and found[2] == 90 and abs(found[3]) < 1e-35
    assert found[4] == torch.tensor(1e30) and abs(found[5]) < 1e-8 and found[6] == float("inf")
    assert found[8].isnan()


def caches(dtype: torch.dtype, blocks: int, size: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Full of NaN, stored heads first."""
    return tuple(torch.full((blocks, heads, size, dim), torch.nan, dtype=dtype).transpose(1, 2) for _ in range(2))


@needs_kernels
@each_number
def test_rotation_and_cache_write(number: torch.dtype) -> None:
    tokens, heads, kv_heads, dim = 9, 6, 2, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(number)
    angles = torch.rand(50, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1).to(number)
    positions = torch.randint(50, (tokens,))
    slots = torch.randperm(40)[:tokens]
    slots[3] = -1
    ours, theirs = (caches(number, 10, 4, kv_heads, dim) for _ in range(2))
    mine, expected = qkv.clone(), qkv.clone()
    ops.rotary_and_cache(mine, table, positions, *ours, slots)
    reference.rotary_and_cache(expected, table, positions, *theirs, slots)
    queries = heads * dim
    near(mine[:, :queries], expected[:, :queries])
    assert torch.equal(mine[:, queries + kv_heads * dim :], qkv[:, queries + kv_heads * dim :]), "values stay"
    for found, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(found.isnan(), wanted.isnan())
        near(found.nan_to_num(), wanted.nan_to_num())
    written = slots >= 0
    keys = mine[written, queries : queries + kv_heads * dim].view(-1, kv_heads, dim)
    assert torch.equal(keys, ours[0][slots[written] // 4, slots[written] % 4]), "keys are rotated in place, too"


@needs_kernels
@each_number
@pytest.mark.parametrize("trial", range(25))
def test_attention_over_random_batches(number: torch.dtype, trial: int) -> None:
    """Lengths from nothing to several pieces, windows, tables wider than needed; unwritten slots are NaN."""
    rng = random.Random(trial)
    dim, size = rng.choice([8, 16, 32, 64, 64, 80, 96, 128, 256]), rng.choice([1, 4, 16, 32])
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.choice([1, 2, 3, 5])
    lens = [rng.choice([0, 1, size, rng.randint(1, 60), rng.randint(1, 900)]) for _ in range(rng.randint(1, 6))]
    width = max(-(-length // size) for length in lens) + rng.randint(1, 3)
    keys, values = caches(number, sum(-(-length // size) for length in lens) + 1, size, kv_heads, dim)
    free = torch.randperm(len(keys)).tolist()
    table = torch.full((len(lens), width), len(keys) - 1, dtype=torch.int32)
    for row, length in enumerate(lens):
        for block in range(-(-length // size)):
            table[row, block] = free.pop()
            filled = min(size, length - block * size)
            for cache in (keys, values):
                cache[table[row, block], :filled] = torch.randn(filled, kv_heads, dim).to(number)
    query = torch.randn(len(lens), heads + 2, dim).to(number)[:, :heads]  # rows that are parts of longer ones
    seq_lens, window = torch.tensor(lens, dtype=torch.int32), rng.choice([None, 1, 7, 300])
    arguments = (table, seq_lens, dim**-0.5)
    found = ops.paged_attention_decode(query, keys, values, *arguments, sliding_window=window)
    wide = (tensor.double() for tensor in (query, keys, values))
    expected = reference.paged_attention_decode(*wide, *arguments, sliding_window=window)
    near(found, expected)


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 7, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1536), (7, 5), (1, 1), (33, 4)])
def test_a_few_rows_times_a_matrix(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    near(ops.few_rows_linear(x, weight) / inputs**0.5, reference.few_rows_linear(x.double(), weight.double()) / inputs**0.5)
    half = weight.half()
    near(ops.few_rows_linear(x, half) / inputs**0.5, reference.few_rows_linear(x.double(), half.double()) / inputs**0.5)


def packs(number: torch.dtype) -> bool:
    return ops is not None and (ops.PACKS_BFLOAT16 if number == torch.bfloat16 else ops.PACKS_FLOAT32)


def packed_weight(number: torch.dtype, outputs: int, inputs: int) -> torch.Tensor:
    """Of the dtype that is packed for rows of dtype `number`."""
    if not packs(number):
        pytest.skip(f"no packed product of {number} on this processor")
    return (torch.randn(outputs, inputs) / inputs**0.5).to(torch.float16 if number == torch.float32 else number)


@each_number
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 17, 25, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 1536), (6, 5), (2, 1), (34, 48), (64, 49), (10, 95)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_times_a_packed_weight(
    number: torch.dtype, rows: int, inputs: int, outputs: int, with_bias: bool
) -> None:
    weight, x = packed_weight(number, outputs, inputs), torch.randn(rows, inputs).to(number)
    bias = torch.randn(outputs).to(number) if with_bias else None
    packed = ops.pack_weight(weight)
    assert packed.shape == weight.shape and torch.equal(ops.unpack_weight(packed, weight.dtype), weight)
    exact = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    near(ops.packed_linear(x, packed, bias), exact)


@each_number
def test_what_is_not_finite_stays_in_its_row_and_output(number: torch.dtype) -> None:
    weight, x = packed_weight(number, 50, 10), torch.randn(9, 10).to(number)
    clean = ops.packed_linear(x, ops.pack_weight(weight))
    x[3, 9], weight[49, 0] = float("nan"), float("inf")
    found = ops.packed_linear(x, ops.pack_weight(weight))
    assert found[3].isnan().all() and not found[:, 49].isfinite().any()
    rest = [row for row in range(9) if row != 3]
    assert torch.equal(found[rest, :49], clean[rest, :49])


def test_packed_float32_is_as_exact_as_any() -> None:
    weight, x = packed_weight(torch.float32, 200, 1536), torch.randn(20, 1536)
    exact = x.double() @ weight.double().T
    plain = torch.nn.functional.linear(x, weight.float()).double()
    error = (ops.packed_linear(x, ops.pack_weight(weight)).double() - exact).square().mean()
    assert error < 1.5 * (plain - exact).square().mean()


def test_an_odd_number_of_inputs_is_for_float32() -> None:
    weight, x = packed_weight(torch.float32, 50, 7), torch.randn(9, 7)
    near(ops.packed_linear(x, ops.pack_weight(weight)), x.double() @ weight.double().T)


@needs_kernels
def test_the_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(300, 576), torch.randn(576)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((ops.rms_norm(x, weight, 1e-5), ops.few_rows_linear(x[:1], x), ops.few_rows_linear(x[:9], x)))
            if packs(torch.bfloat16):
                found[-1] += (ops.packed_linear(x.bfloat16(), ops.pack_weight(x.bfloat16())),)
            if packs(torch.float32):
                found[-1] += (ops.packed_linear(x, ops.pack_weight(x.half())),)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@needs_kernels
def test_bad_arguments_are_named() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    keys, values = caches(torch.float32, 4, 4, 2, 8)
    query, table, lens = torch.randn(2, 2, 8), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    packed = ops.pack_weight(torch.randn(3, 8).bfloat16())
    wrong = {
        r"x: wanted a contiguous CPU tensor .* not Half": lambda: ops.rms_norm(x.half(), weight, 1e-5),
        r"x: .* with strides \[1, 2\]": lambda: ops.rms_norm(torch.randn(8, 2).t(), weight, 1e-5),
        r"weight: .* the last 8": lambda: ops.rms_norm(x, weight[:7], 1e-5),
        r"residual: wanted \[2, 8\]": lambda: ops.rms_norm(x, weight, 1e-5, torch.randn(3, 8)),
        r"weight is BFloat16 and x Float": lambda: ops.rms_norm(x, weight.bfloat16(), 1e-5),
        r"k_cache: .*strides": lambda: ops.paged_attention_decode(query, keys.contiguous(), values, table, lens, 1.0),
        r"query: .* \[2, 2, 4\]": lambda: ops.paged_attention_decode(query[..., :4], keys, values, table, lens, 1.0),
        r"block_table: wanted int32": lambda: ops.paged_attention_decode(query, keys, values, table.long(), lens, 1.0),
        r"seq_lens: .* \[2\], not Int \[1\]": lambda: ops.paged_attention_decode(query, keys, values, table, lens[:1], 1.0),
        r"x: wanted rows of float32": lambda: ops.few_rows_linear(x.bfloat16(), torch.randn(3, 8)),
        r"weight: .* float16, not BFloat16": lambda: ops.few_rows_linear(x, torch.randn(3, 8).bfloat16()),
        r"x: .* the last 9": lambda: ops.few_rows_linear(x, torch.randn(3, 9)),
        r"weight: wanted .* not Float \[3, 8\]": lambda: ops.pack_weight(torch.randn(3, 8)),
        r"weight: .* even .* \[3, 7\]": lambda: ops.pack_weight(torch.randn(3, 7).bfloat16()),
        r"weight: wanted what pack_weight returned": lambda: ops.packed_linear(x.bfloat16(), torch.randn(3, 8)),
        r"dtype: wanted bfloat16 or float16, not Float": lambda: ops.unpack_weight(packed, torch.float32),
        r"x: .* not Half": lambda: ops.packed_linear(x.half(), packed),
        r"x: .* the last 8, .* not BFloat16 \[2, 4\]": lambda: ops.packed_linear(x[:, :4].bfloat16(), packed),
        r"x: .* not BFloat16 \[8\]": lambda: ops.packed_linear(weight.bfloat16(), packed),
        r"bias: .* the last 3": lambda: ops.packed_linear(x.bfloat16(), packed, weight.bfloat16()),
        r"bias is Float and x BFloat16": lambda: ops.packed_linear(x.bfloat16(), packed, torch.randn(3)),
    }  # fmt: skip
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    odd = caches(torch.float32, 4, 4, 1, 6)
    with pytest.raises(ValueError, match="heads of 6; compiled are"):
        ops.paged_attention_decode(torch.randn(2, 2, 6), *odd, table, lens, 1.0)


# ---- compiling -----------------------------------------------------------------------------------


def run_build(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kernels.cpu.build"]
    return subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_compiler_the_remedy_is_said(tmp_path: Path) -> None:
    done = run_build(PATH=str(tmp_path), HOME=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0
    assert "no CPU kernels: there is no C++ compiler" in done.stdout or "on Linux only" in done.stdout


@needs_kernels
def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exec /usr/bin/c++ --version\nexit 1\n")
    compiler.chmod(0o755)
    done = run_build(PATH=f"{tmp_path}:/usr/bin:/bin", HOME=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path / "built"))
    assert done.returncode == 0 and "no CPU kernels: the compiler failed" in done.stdout
    assert not [path for path in (tmp_path / "built").rglob("*") if path.is_file()]


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library_path()
    *others, last = build.SOURCES
    changed = tmp_path / last.name
    changed.write_text(last.read_text(encoding="utf-8") + "\n")
    monkeypatch.setattr(build, "SOURCES", [*others, changed])
    assert build.library_path() != before
