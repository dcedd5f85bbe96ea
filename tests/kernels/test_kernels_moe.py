"""Grouping by expert and the experts' products against the reference, and the reference against dense torch."""

import pytest
import torch
import torch.nn.functional as F

from kernels import reference


def _routing(tokens, num_experts, top_k, seed=0):
    """Random, different experts per token, and their factors."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k)
    return ids, weights


def _experts(num_experts, hidden, inner, dtype, seed=1):
    """Matrices with NaN behind each row, so that a wrong stride or mask shows."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        whole = torch.full((*shape[:-1], shape[-1] + 3), float("nan"))
        whole[..., : shape[-1]] = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return whole.to(dtype)[..., : shape[-1]]

    return randn(num_experts, 2 * inner, hidden), randn(num_experts, hidden, inner)


def _on(device, tensor):
    """A copy on the device with the same gaps."""
    size = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    moved = torch.full((size,), float("nan"), dtype=tensor.dtype, device=device)
    return moved.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def test_reference_is_every_expert_on_every_token_and_a_choice():
    """Independent of the reference: all experts for all tokens, unchosen ones weighted with zero."""
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate_up, down = (w.double() for w in _experts(5, 12, 6, torch.float64))
    ids, weights = _routing(7, 5, 3)
    gates, ups = torch.einsum("eih,th->tei", gate_up, x).chunk(2, dim=-1)
    outputs = torch.einsum("ehi,tei->teh", down, F.silu(gates) * ups)
    chosen = torch.zeros(7, 5, dtype=torch.float64).scatter_(1, ids, weights.double())
    expected = torch.einsum("te,teh->th", chosen, outputs)
    torch.testing.assert_close(reference.moe_mlp(x, gate_up, down, ids, weights.double()), expected)


def test_reference_over_ranges_of_experts_adds_up():
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gate_up, down = _experts(5, 8, 4, torch.float64)
    ids, weights = _routing(4, 5, 2)
    whole = reference.moe_mlp(x, gate_up, down, ids, weights)
    parts = [
        reference.moe_mlp(x, gate_up[r.start : r.stop], down[r.start : r.stop], ids, weights, first_expert=r.start)
        for r in (range(0, 2), range(2, 5))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_reference_groups_by_hand():
    ids = torch.tensor([2, 0, 2, 7, 2, 1, 0])
    assignments, owners = reference.group_by_expert(ids, first_expert=0, num_experts=3, block_size=2)
    assert owners.tolist() == [0, 1, 2, 2, -1]
    assert assignments.tolist() == [1, 6, 5, 7, 0, 2, 4, 7, 7, 7]
    assignments, owners = reference.group_by_expert(ids, first_expert=2, num_experts=1, block_size=2)
    assert owners.tolist() == [0, 0, -1, -1]
    assert assignments.tolist() == [0, 2, 4, 7, 7, 7, 7, 7]


# assignments, experts in all, first expert, experts here, block size
GROUPS = [
    (0, 4, 0, 4, 16),
    (1, 1, 0, 1, 16),
    (7, 8, 0, 8, 1),
    (7, 3, 1, 1, 16),
    (300, 5, 0, 5, 16),
    (1500, 3, 0, 3, 32),  # more than a program looks at in one go
    (90, 60, 15, 15, 16),
    (64, 4, 3, 1, 64),
]


@pytest.mark.parametrize(("total", "everywhere", "first", "here", "block_size"), GROUPS)
def test_groups_match_reference(triton_kernels, device, total, everywhere, first, here, block_size):
    ids = torch.randint(everywhere, (total,), generator=torch.Generator().manual_seed(total)).to(device)
    options = dict(first_expert=first, num_experts=here, block_size=block_size)
    expected = reference.group_by_expert(ids, **options)
    for actual, wanted in zip(triton_kernels.group_by_expert(ids, **options), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_all_to_one_expert_needs_no_more_blocks_than_promised(triton_kernels, device):
    ids = torch.full((100,), 3, device=device)
    options = dict(first_expert=0, num_experts=4, block_size=8)
    assignments, owners = triton_kernels.group_by_expert(ids, **options)
    assert owners.tolist() == [3] * 13 + [-1] * 3
    assert assignments[:100].tolist() == list(range(100))


# tokens, experts, top_k, hidden, inner, (first, number) of the experts here
SIZES = [
    (1, 4, 2, 48, 40, (0, 4)),
    (5, 3, 1, 16, 16, (0, 3)),
    (9, 8, 2, 33, 17, (0, 8)),  # nothing divides anything
    (40, 2, 2, 64, 24, (0, 2)),  # several blocks per expert
    (11, 6, 3, 40, 130, (2, 2)),  # some experts are elsewhere
    (3, 4, 2, 24, 16, (3, 1)),
    (70, 1, 1, 20, 70, (0, 1)),
]


@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "hidden", "inner", "share"), SIZES)
def test_moe_mlp_matches_reference(
    triton_kernels, device, assert_matches, dtype, tokens, num_experts, top_k, hidden, inner, share
):
    first, number = share
    gate_up, down = (_on(device, w[first : first + number]) for w in _experts(num_experts, hidden, inner, dtype))
    generator = torch.Generator().manual_seed(2)
    x = _on(device, torch.randn(tokens, hidden + 5, generator=generator).to(dtype)[:, :hidden])
    ids, weights = (t.to(device) for t in _routing(tokens, num_experts, top_k))
    actual = triton_kernels.moe_mlp(x, gate_up, down, ids, weights, first_expert=first)
    assert actual.dtype == dtype
    wide = (t.double() for t in (x, gate_up, down))
    assert_matches(actual, reference.moe_mlp(*wide, ids, weights.double(), first_expert=first))


@pytest.mark.parametrize(("tokens", "number"), [(0, 4), (3, 0)])
def test_no_tokens_or_no_experts_is_zero(triton_kernels, device, tokens, number):
    gate_up, down = torch.zeros(number, 8, 6, device=device), torch.zeros(number, 6, 4, device=device)
    ids, weights = torch.zeros(tokens, 2, dtype=torch.int64, device=device), torch.ones(tokens, 2, device=device)
    out = triton_kernels.moe_mlp(torch.ones(tokens, 6, device=device), gate_up, down, ids, weights)
    assert torch.equal(out, torch.zeros(tokens, 6, device=device))


def test_wrong_arguments_are_refused(triton_kernels, device):
    right = {
        "x": torch.zeros(3, 8, device=device),
        "gate_up": torch.zeros(4, 12, 8, device=device),
        "down": torch.zeros(4, 8, 6, device=device),
        "expert_ids": torch.zeros(3, 2, dtype=torch.int64, device=device),
        "expert_weights": torch.zeros(3, 2, device=device),
    }
    triton_kernels.moe_mlp(**right)
    for changes, error, message in (
        ({"x": right["x"][:, :4]}, ValueError, "down has shape"),
        ({"x": right["x"].half()}, TypeError, "gate_up is torch.float32"),
        ({"gate_up": right["gate_up"][:, :11]}, ValueError, "gate_up has shape"),
        ({"down": right["down"].mT}, ValueError, "down has shape"),
        ({"gate_up": right["gate_up"].mT.contiguous().mT}, ValueError, "gate_up must be contiguous"),
        ({"expert_ids": right["expert_ids"].int()}, TypeError, "expert_ids is torch.int32"),
        ({"expert_ids": right["expert_ids"][:2]}, ValueError, "expert_ids has shape"),
        ({"expert_weights": right["expert_weights"][:, :1]}, ValueError, "expert_weights has shape"),
        ({"expert_weights": right["expert_weights"].half()}, TypeError, "expert_weights is torch.float16"),
    ):
        with pytest.raises(error, match=message):
            triton_kernels.moe_mlp(**(right | changes))
    with pytest.raises(ValueError, match="block_size 0"):
        triton_kernels.group_by_expert(right["expert_ids"].view(-1), first_expert=0, num_experts=4, block_size=0)
