"""The plain-torch truth for every kernel: same names, same arguments, written to be obviously right.

Owns the meaning of the paged KV cache operations and of the fused layer operations; a kernel is correct when it
agrees with the function of its name here. Invariant: results depend only on cache slots that a query may attend to,
so a slot nobody wrote can hold anything, NaN included. Arithmetic is float32, or float64 for float64 inputs.
Loops over requests and query tokens on the host; not meant to be fast.

vLLM: tests/kernels/attention/test_attention.py (`ref_single_query_cached_kv_attention`) and
test_triton_unified_attention.py (`ref_paged_attn`).
"""

import torch
from torch import Tensor


def reshape_and_cache(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write each token's key and value into its cache slot, in place.

    Args:
        key, value: [T, Hkv, D].
        k_cache, v_cache: [NB, BS, Hkv, D], any strides; written.
        slot_mapping: int64 [T]; slot = block * BS + offset in the block, -1 = do not write this row.
    """
    block_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            k_cache[slot // block_size, slot % block_size] = key[token]
            v_cache[slot // block_size, slot % block_size] = value[token]


def paged_attention_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None = None,
    num_splits: int | None = None,
    max_seq_len: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query token per request, the last token of its sequence.

    Args:
        query: [B, H, D].
        k_cache, v_cache: [NB, BS, Hkv, D]; H is a multiple of Hkv.
        block_table: int32 [B, MB]; block_table[b, i] holds tokens i*BS .. (i+1)*BS-1 of request b.
        seq_lens: int32 [B], tokens in the cache, the query's own included; 0 gives a zero row.
        scale: factor on the scores, usually D ** -0.5.
        sliding_window: attend to at most this many tokens, the query's own included.
        num_splits, max_seq_len: how a kernel divides its work; the result does not depend on them.
        out: [B, H, D], written if given.

    Returns:
        [B, H, D], `out` if given.
    """
    query_start_loc = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
    return paged_attention_varlen(
        query, k_cache, v_cache, block_table, seq_lens, query_start_loc, scale,
        max_query_len=1, sliding_window=sliding_window, out=out,
    )  # fmt: skip


def paged_attention_varlen(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    *,
    max_query_len: int,
    sliding_window: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of a ragged batch: each request brings any number of its newest tokens.

    Query i of request b is the token at position seq_lens[b] - query_len[b] + i and attends to every
    position p up to its own (p > own - sliding_window with a window).

    Args:
        query: [T, H, D], the requests' tokens one after another.
        k_cache, v_cache, block_table, scale, sliding_window: as in `paged_attention_decode`.
        seq_lens: int32 [B], tokens in the cache, this step's included.
        query_start_loc: int32 [B+1], non-decreasing from 0; request b owns rows
            query_start_loc[b] .. query_start_loc[b+1]-1 (none for a padding request).
        max_query_len: the longest of them, known to the host; sizes a kernel's tiles.
        out: [T, H, D], written if given. Rows that no request owns are left as they are; without
            `out` they are zero.

    Returns:
        [T, H, D], `out` if given. A query that may attend to nothing gives a zero row.
    """
    if out is None:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    block_size, num_kv_heads = k_cache.shape[1:3]
    queries_per_kv = query.shape[1] // num_kv_heads
    starts = query_start_loc.tolist()

    for request, seq_len in enumerate(seq_lens.tolist()):
        query_len = starts[request + 1] - starts[request]
        for i in range(query_len):
            row = starts[request] + i
            last = seq_len - query_len + i
            first = 0 if sliding_window is None else max(0, last - sliding_window + 1)
            if last < first:
                out[row] = 0
                continue
            # Gather what this query sees, and nothing else, out of the blocks: [keys, Hkv, D].
            positions = torch.arange(first, last + 1, device=query.device)
            blocks = block_table[request, positions // block_size].long()
            keys = k_cache[blocks, positions % block_size].to(compute_dtype)
            values = v_cache[blocks, positions % block_size].to(compute_dtype)
            keys = keys.repeat_interleave(queries_per_kv, dim=1)
            values = values.repeat_interleave(queries_per_kv, dim=1)

            scores = torch.einsum("hd,nhd->hn", query[row].to(compute_dtype), keys) * scale
            weights = torch.softmax(scores, dim=-1)
            out[row] = torch.einsum("hn,nhd->hd", weights, values).to(out.dtype)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square normalisation of rows, after adding the residual stream if there is one.

    Args:
        x: [T, N]; with `residual` it is overwritten by x + residual, rounded to its dtype.
        weight: [N].
        eps: added to the mean square.
        residual: [T, N], not changed.

    Returns:
        [T, N]: x / sqrt(mean(x^2) + eps) * weight, of the x just described.
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if residual is not None:
        x.copy_(x.to(compute_dtype) + residual.to(compute_dtype))
    value = x.to(compute_dtype)
    scale = torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + eps)
    return (value * scale * weight.to(compute_dtype)).to(x.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 * I], gate first -> gate * sigmoid(gate) * up, [T, I]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def rotary_and_cache(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Rotate queries and keys (neox style: dimension i with i + D/2), then write keys and values to the cache.

    Args:
        qkv: [T, (H + 2 * Hkv) * D]; the query part is rotated in place, the rest stays as it is.
        cos_sin: [P, D], row p: the D/2 cosines of position p, then its sines.
        positions: int64 [T], rows of cos_sin.
        k_cache, v_cache, slot_mapping: as in `reshape_and_cache`.
    """
    num_kv_heads, head_dim = k_cache.shape[2:]
    compute_dtype = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.view(len(qkv), -1, head_dim)
    num_rotated = heads.shape[1] - num_kv_heads  # all but the values
    cos, sin = cos_sin[positions].to(compute_dtype).unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[:, :num_rotated].to(compute_dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    num_heads = num_rotated - num_kv_heads
    heads[:, :num_heads] = rotated[:, :num_heads]
    reshape_and_cache(rotated[:, num_heads:], heads[:, num_rotated:], k_cache, v_cache, slot_mapping)


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] times the transpose of weight [O, I], which may be of a narrower dtype -> [T, O]."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute_dtype) @ weight.to(compute_dtype).T).to(x.dtype)


def moe_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, *, first_expert: int = 0
) -> Tensor:
    """Gated MLPs, several to choose from: each token goes through those it is sent to, and their outputs are added.

    Args:
        x: [T, N].
        gate_up: [E, 2 * I, N], gate first; down: [E, N, I]. The experts first_expert .. first_expert + E - 1.
        expert_ids: int64 [T, k]; ids of other experts, which live elsewhere, count as a zero output.
        expert_weights: float32 [T, k], factors on the outputs.

    Returns:
        [T, N].
    """
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    for token, (ids, weights) in enumerate(zip(expert_ids.tolist(), expert_weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if first_expert <= expert < first_expert + len(gate_up):
                inner = silu_and_mul(gate_up[expert - first_expert].to(compute_dtype) @ x[token].to(compute_dtype))
                out[token] += weight * (down[expert - first_expert].to(compute_dtype) @ inner)
    return out.to(x.dtype)


def group_by_expert(
    expert_ids: Tensor, *, first_expert: int, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Sort assignments of tokens to experts into blocks of which each is one expert's.

    Args:
        expert_ids: int64 [M]: assignment m is to this expert; others than the `num_experts` from `first_expert` on
            are left out.
        block_size: assignments per block.

    Returns:
        (assignments, block_experts): int32 [B * block_size], each expert's assignments in ascending order, its last
        block filled up with M; and int32 [B], whose each block is, counted from first_expert, -1 for blocks that
        nobody needed. B is the most that any M assignments could need.
    """
    total = len(expert_ids)
    most_experts = min(num_experts, total)  # each of them with one assignment, one with all the rest
    num_blocks = most_experts + (total - most_experts) // block_size
    assignments = torch.full((num_blocks * block_size,), total, dtype=torch.int32)
    block_experts = torch.full((num_blocks,), -1, dtype=torch.int32)
    block = 0
    for expert in range(num_experts):
        own = [m for m, other in enumerate(expert_ids.tolist()) if other == first_expert + expert]
        assignments[block * block_size : block * block_size + len(own)] = torch.tensor(own, dtype=torch.int32)
        end = block + -(-len(own) // block_size)
        block_experts[block:end] = expert
        block = end
    return assignments.to(expert_ids.device), block_experts.to(expert_ids.device)
