"""The fused layer kernels against the float64 reference: norm, activation, rotation with cache write."""

import pytest
import torch

from kernels import reference

ROWS_AND_SIZES = [(1, 1), (3, 16), (5, 48), (2, 576), (4, 1000), (1, 4096), (0, 64)]


def _randn(device, dtype, *shape, seed=0, gap=8):
    """Random values whose rows have a gap of NaN behind them, so that no stride is the size."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype)
    whole[..., : shape[-1]] = torch.randn(shape, generator=generator).to(dtype)
    return whole.to(device)[..., : shape[-1]]


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "size"), ROWS_AND_SIZES)
def test_rms_norm_matches_reference(triton_kernels, device, assert_matches, dtype, rows, size, add):
    x = _randn(device, dtype, rows, size)
    weight = _randn(device, dtype, size, seed=1)
    residual = _randn(device, dtype, rows, size, seed=2) if add else None
    before = None if residual is None else residual.clone()
    # The reference in the dtype itself rounds the sum as the kernel must; float64 then judges the rest.
    summed = x.clone()
    if residual is not None:
        reference.rms_norm(summed, weight, 1e-5, residual)
    expected = reference.rms_norm(summed.double(), weight.double(), 1e-5)
    actual = triton_kernels.rms_norm(x, weight, 1e-5, residual)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert_matches(actual, expected)
    assert torch.equal(x, summed), "x must be the rounded sum"
    if residual is not None:
        assert torch.equal(residual, before), "the residual is not to be changed"


def test_rms_norm_of_large_values_does_not_overflow(triton_kernels, device):
    """Squares of 300 do not fit float16."""
    x = torch.full((1, 64), 300.0, dtype=torch.float16, device=device)
    weight = torch.ones(64, dtype=torch.float16, device=device)
    torch.testing.assert_close(triton_kernels.rms_norm(x, weight, 1e-6), torch.ones_like(x))


@pytest.mark.parametrize(("rows", "size"), ROWS_AND_SIZES)
def test_silu_and_mul_matches_reference(triton_kernels, device, assert_matches, dtype, rows, size):
    gate_up = _randn(device, dtype, rows, 2 * size)
    actual = triton_kernels.silu_and_mul(gate_up)
    assert actual.dtype == dtype
    assert_matches(actual, reference.silu_and_mul(gate_up.double()))


def test_silu_of_extreme_gates(triton_kernels, device):
    gate_up = torch.tensor([[-100.0, 0.0, 100.0, 1.0, 1.0, 1.0]], device=device)
    expected = torch.tensor([[0.0, 0.0, 100.0]], device=device)
    torch.testing.assert_close(triton_kernels.silu_and_mul(gate_up), expected)


# num_heads, num_kv_heads, head_dim, block_size, heads first
ROTARY_CASES = [
    (9, 3, 64, 16, False),  # SmolLM2-135M
    (9, 3, 64, 16, True),
    (1, 1, 16, 1, False),
    (4, 1, 80, 4, True),
    (40, 8, 128, 32, False),  # more heads than one program takes
    (3, 3, 24, 256, False),
    (2, 1, 2, 8, True),
]


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_size", "heads_first"), ROTARY_CASES)
def test_rotary_and_cache_matches_reference(
    triton_kernels, device, assert_matches, dtype, num_heads, num_kv_heads, head_dim, block_size, heads_first
):
    tokens, num_blocks = 5, 4
    qkv = _randn(device, dtype, tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    angles = torch.randn(50, head_dim // 2, generator=torch.Generator().manual_seed(3))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype).to(device)
    positions = torch.tensor([0, 49, 7, 7, 3], device=device)
    slots = torch.tensor([num_blocks * block_size - 1, -1, 0, 2, 1], device=device)
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    if not heads_first:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, 7.0, dtype=dtype, device=device) for _ in range(2)]
    if heads_first:
        caches = [cache.transpose(1, 2) for cache in caches]

    # The queries' view is copied with its gaps dropped: the reference needs a plain matrix.
    expected_qkv = qkv.double().contiguous()
    expected_caches = [cache.double().contiguous() for cache in caches]
    reference.rotary_and_cache(expected_qkv, cos_sin.double(), positions, *expected_caches, slots)
    triton_kernels.rotary_and_cache(qkv, cos_sin, positions, *caches, slots)
    assert_matches(qkv, expected_qkv)
    for actual, expected in zip(caches, expected_caches, strict=True):
        assert_matches(actual, expected)
        assert actual.eq(7).sum() == expected.eq(7).sum(), "a slot that nobody named was written"


def test_rotary_and_cache_is_rotation_then_write(triton_kernels, device):
    """Independent of the reference: what the layers do one after another."""
    from course_lib.layers.rotary import apply_rotary

    heads, kv_heads, dim = 4, 2, 16
    qkv = _randn(device, torch.float32, 3, (heads + 2 * kv_heads) * dim, gap=0)
    angles = torch.randn(9, dim // 2, generator=torch.Generator().manual_seed(3)).to(device)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.tensor([8, 0, 5], device=device)
    cos, sin = (t.unsqueeze(1) for t in cos_sin[positions].chunk(2, dim=-1))
    qk = qkv.view(3, -1, dim)[:, : heads + kv_heads]
    rotated = apply_rotary(qk, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    values = qkv.view(3, -1, dim)[:, heads + kv_heads :].clone()
    caches = [torch.zeros(2, 4, kv_heads, dim, device=device) for _ in range(2)]
    triton_kernels.rotary_and_cache(qkv, cos_sin, positions, *caches, torch.tensor([6, 1, 2], device=device))
    torch.testing.assert_close(qkv.view(3, -1, dim)[:, :heads], rotated[:, :heads])
    torch.testing.assert_close(caches[0].flatten(0, 1)[[6, 1, 2]], rotated[:, heads:])
    torch.testing.assert_close(caches[1].flatten(0, 1)[[6, 1, 2]], values)


@pytest.mark.parametrize("rows", [0, 1, 2, 4])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 16), (960, 576), (130, 1536), (2050, 40)])
def test_few_rows_linear_matches_reference(
    triton_kernels, device, assert_matches, dtype, rows, out_features, in_features
):
    x = _randn(device, dtype, rows, in_features)
    weight = _randn(device, dtype, out_features, in_features, seed=1, gap=16) / in_features**0.5
    actual = triton_kernels.few_rows_linear(x, weight)
    assert actual.dtype == dtype
    assert_matches(actual, reference.few_rows_linear(x.double(), weight.double()))


def test_wrong_arguments_are_refused(triton_kernels, device):
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="weight has shape"):
        triton_kernels.rms_norm(x, weight[:4], 1e-5)
    with pytest.raises(ValueError, match="residual has shape"):
        triton_kernels.rms_norm(x, weight, 1e-5, x[:1])
    with pytest.raises(TypeError, match="weight is torch.float16"):
        triton_kernels.rms_norm(x, weight.half(), 1e-5)
    with pytest.raises(ValueError, match="x must be contiguous"):
        triton_kernels.rms_norm(torch.zeros(8, 8, device=device).T, weight, 1e-5)
    with pytest.raises(ValueError, match="gate_up has 7 columns"):
        triton_kernels.silu_and_mul(torch.zeros(2, 7, device=device))
    with pytest.raises(TypeError, match="gate_up is torch.int32"):
        triton_kernels.silu_and_mul(torch.zeros(2, 8, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="x has shape"):
        triton_kernels.few_rows_linear(torch.zeros(5, 8, device=device), torch.zeros(3, 8, device=device))
    with pytest.raises(ValueError, match="weight has shape"):
        triton_kernels.few_rows_linear(x, torch.zeros(3, 4, device=device))
    cache = torch.zeros(2, 4, 2, 16, device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    table = torch.zeros(5, 16, device=device)
    arguments = {
        "qkv": torch.zeros(3, 96, device=device), "cos_sin": table, "positions": index, "k_cache": cache,
        "v_cache": cache, "slot_mapping": index - 1,
    }  # fmt: skip
    triton_kernels.rotary_and_cache(**arguments)
    for changes, error, message in (
        ({"qkv": torch.zeros(3, 64, device=device)}, ValueError, "qkv has 64 columns"),
        ({"qkv": arguments["qkv"].half()}, TypeError, "k_cache is torch.float32"),
        ({"cos_sin": table[:, :8]}, ValueError, "cos_sin has shape"),
        ({"positions": index.int()}, TypeError, "positions is torch.int32"),
        ({"slot_mapping": index[:2]}, ValueError, "slot_mapping has shape"),
    ):
        with pytest.raises(error, match=message):
            triton_kernels.rotary_and_cache(**(arguments | changes))
