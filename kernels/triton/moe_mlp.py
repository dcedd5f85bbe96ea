"""The experts of a mixture-of-experts layer: matrix products in which every tile of rows has a weight of its own.

Two launches of one kernel: rows through their expert's gate and up matrices with the activation applied on the spot,
then through its down matrix with the router's factor applied on the spot. A row is never moved: a tile gathers its
rows where they lie, by the order that `moe_groups` has made, and scatters its results. Invariant: accumulated in
float32; an expert that nobody was sent to is not read.

vLLM: vllm/model_executor/layers/fused_moe/fused_moe.py (`fused_moe_kernel`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.moe_groups import group_by_expert
from kernels.triton.tiles import ExpertTile, expert_tile


@triton.jit
def _expert_linear_kernel(
    x, weight, out, factors, assignments, block_experts,
    x_stride, weight_stride_e, weight_stride_n, out_stride, total, out_features, in_features,
    ROWS_PER_INPUT: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M assignments to one expert x BLOCK_N output features (gated: of each half)."""
    block = tl.program_id(1)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    assignment = tl.load(assignments + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_row = assignment < total
    assignment = assignment.to(tl.int64)
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_feature = features < out_features
    inner = tl.arange(0, BLOCK_K)
    x_tile = x + (assignment // ROWS_PER_INPUT)[:, None] * x_stride + inner[None, :]
    w_tile = weight + expert * weight_stride_e + features.to(tl.int64)[None, :] * weight_stride_n + inner[:, None]
    second_half = weight_stride_n * out_features  # gated: from a gate's row to its up row

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        in_range = inner < in_features - start
        values = tl.load(x_tile + start, mask=is_row[:, None] & in_range[None, :], other=0.0)
        w_mask = is_feature[None, :] & in_range[:, None]
        w = tl.load(w_tile + start, mask=w_mask, other=0.0)
        acc = tl.dot(values, w, acc, input_precision="ieee")
        if GATED:
            up = tl.load(w_tile + second_half + start, mask=w_mask, other=0.0)
            acc_up = tl.dot(values, up, acc_up, input_precision="ieee")

    if GATED:
        # Rounded as two products stored and read again would be: the torch path's result, bit for bit or nearly.
        gate = acc.to(out.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * acc_up.to(out.dtype.element_ty).to(tl.float32)
    if SCALED:
        acc *= tl.load(factors + assignment, mask=is_row, other=0.0)[:, None]
    place = out + assignment[:, None] * out_stride + features[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_feature[None, :])


def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, first_expert: int = 0
) -> Tensor:
    """x [T, N] through the experts each token is sent to, their outputs weighted and added -> [T, N].

    Args and meaning: `kernels.reference.moe_mlp`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    tokens, hidden = _check(x, gate_up, down, expert_ids, expert_weights)
    num_experts, top_k = len(gate_up), expert_ids.shape[1]
    if num_experts == 0 or expert_ids.numel() == 0 or x.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    tile = expert_tile(expert_ids.numel(), num_experts, x.dtype)
    groups = group_by_expert(
        expert_ids.reshape(-1), first_expert=first_expert, num_experts=num_experts, block_size=tile.block_m
    )
    inner = x.new_empty((tokens * top_k, down.shape[2]))
    # Experts that live elsewhere contribute zero.
    outputs = x.new_zeros((tokens * top_k, hidden))
    with launch.on_device_of(x):
        _launch(x, gate_up, inner, None, groups, tile, rows_per_input=top_k)
        _launch(inner, down, outputs, expert_weights.reshape(-1), groups, tile, rows_per_input=1)
    return outputs.view(tokens, top_k, hidden).sum(dim=1)


def _launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    factors: Tensor | None,
    groups: tuple[Tensor, Tensor],
    tile: ExpertTile,
    *,
    rows_per_input: int,
) -> None:
    """Without factors it is the gated product."""
    assignments, block_experts = groups
    out_features = out.shape[1]
    _expert_linear_kernel[(triton.cdiv(out_features, tile.block_n), len(block_experts))](
        x, weight, out, factors, assignments, block_experts,
        x.stride(0), weight.stride(0), weight.stride(1), out.stride(0), len(out), out_features, x.shape[1],
        ROWS_PER_INPUT=rows_per_input, GATED=factors is None, SCALED=factors is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _check(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor
) -> tuple[int, int]:
    launch.check_shape("x", x, (None, None))
    tokens, hidden = x.shape
    launch.check_shape("down", down, (None, hidden, None))
    launch.check_shape("gate_up", gate_up, (len(down), 2 * down.shape[2], hidden))
    launch.check_rows({"x": x, "gate_up": gate_up, "down": down})
    launch.check_index("expert_ids", expert_ids, torch.int64, (tokens, None), x.device)
    launch.check_index("expert_weights", expert_weights, torch.float32, tuple(expert_ids.shape), x.device)
    return tokens, hidden
