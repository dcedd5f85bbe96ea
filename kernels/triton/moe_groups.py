"""Sorts a batch's assignments of tokens to experts into blocks of which each belongs to one expert.

A matrix product works on tiles of rows with one weight; so each expert's run of rows is filled up to whole tiles.
Counting comes first, placing second, each with one program per expert that looks through all assignments: they are
few numbers, and no program waits for another. Invariant: an expert's assignments keep their order, so results do
not change from run to run.

vLLM: csrc/moe/moe_align_sum_kernels.cu (`moe_align_block_size`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import launch
from kernels.triton.tiles import ELEMENTWISE_BLOCK, next_power_of_2


@triton.jit
def _count_kernel(expert_ids, counts, total, first_expert, BLOCK: tl.constexpr):
    """One program: how many assignments one expert has."""
    expert = tl.program_id(0)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, total, BLOCK):
        index = start + tl.arange(0, BLOCK)
        chosen = tl.load(expert_ids + index, mask=index < total, other=-1)
        count += (chosen == first_expert + expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(count, axis=0))


@triton.jit
def _place_kernel(
    expert_ids, counts, assignments, block_experts, total, first_expert, num_experts,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program: the blocks of one expert, which lie behind those of all before it."""
    expert = tl.program_id(0)
    others = tl.arange(0, EXPERTS)
    all_counts = tl.load(counts + others, mask=others < num_experts, other=0)
    all_blocks = (all_counts + BLOCK_SIZE - 1) // BLOCK_SIZE
    first_block = tl.sum(tl.where(others < expert, all_blocks, 0), axis=0)
    num_blocks = tl.sum(tl.where(others == expert, all_blocks, 0), axis=0)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        owner = tl.zeros([BLOCK], dtype=tl.int32) + expert
        tl.store(block_experts + first_block + block, owner, mask=block < num_blocks)

    placed = first_block * BLOCK_SIZE
    for start in range(0, total, BLOCK):
        index = start + tl.arange(0, BLOCK)
        chosen = tl.load(expert_ids + index, mask=index < total, other=-1)
        mine = (chosen == first_expert + expert).to(tl.int32)
        place = placed + tl.cumsum(mine, axis=0) - mine
        tl.store(assignments + place, index, mask=mine == 1)
        placed += tl.sum(mine, axis=0)


def group_by_expert(
    expert_ids: Tensor, *, first_expert: int, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Assignments int64 [M] -> (assignments by expert int32 [B * block_size], expert of each block int32 [B]).

    Args and meaning: `kernels.reference.group_by_expert`.

    Raises:
        TypeError, ValueError: naming the argument; see `kernels.triton.launch`.
    """
    device = expert_ids.device
    launch.check_index("expert_ids", expert_ids, torch.int64, (None,), device)
    if num_experts < 1 or block_size < 1:
        raise ValueError(f"num_experts is {num_experts} and block_size {block_size}: each must be at least 1.")
    total = len(expert_ids)
    most_experts = min(num_experts, total)
    num_blocks = most_experts + (total - most_experts) // block_size
    assignments = torch.full((num_blocks * block_size,), total, dtype=torch.int32, device=device)
    block_experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    if total == 0:
        return assignments, block_experts
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    block = min(next_power_of_2(total), ELEMENTWISE_BLOCK)
    with launch.on_device_of(expert_ids):
        _count_kernel[(num_experts,)](expert_ids, counts, total, first_expert, BLOCK=block)
        _place_kernel[(num_experts,)](
            expert_ids, counts, assignments, block_experts, total, first_expert, num_experts,
            BLOCK=block, EXPERTS=next_power_of_2(num_experts), BLOCK_SIZE=block_size,
        )  # fmt: skip
    return assignments, block_experts
