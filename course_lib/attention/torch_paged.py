"""Paged attention on a CPU: in plain torch, and where they are compiled by kernels of our own (`kernels/cpu`).

Requests with one new token are what the kernels are for: they read keys and values in the blocks where they lie.
Without them, four things make plain torch quick:
* The cache is stored heads before offsets, `[blocks, Hkv, block size, D]`, so that one gather of
  whole (block, head) rows yields contiguous keys per head, which batched matrix products want.
* Requests with one new token are gathered and computed together, in groups of similar length that
  fit the processor's cache: gathered bytes are then read back from there and not from memory.
* What many of them have in common (a cached prefix) is gathered once, and all their queries meet it in one product.
* Everything that depends only on the step (indices, masks, groups) is computed once, not per layer.

The query heads that share a KV head ride along as extra query rows, so nothing is repeated for GQA.

vLLM: `vllm/v1/attention/backends/cpu_attn.py` does the same job with C++ kernels. Common prefixes: Hydragen
(arXiv:2402.05099); vLLM's `use_cascade_attention`, only where all requests of a batch have the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from course_lib.attention.backend import KVCache, zeros_on_demand
from course_lib.attention.metadata import AttentionMetadata
from kernels.cpu import compiled_kernels

# Keys plus values gathered at a time, in bytes: half of a common last-level cache. Half as much was
# slower (more calls), half as much again no faster.
_GATHER_BYTES = 16 << 20
# Up to so many positions of a decode group, scaled_dot_product_attention beats two products and a softmax in 16 bits.
_FEW_POSITIONS = 1024
# Up to so many pairs of a new token and a position, our own kernel beats scaled_dot_product_attention, which multiplies
# larger tiles but takes longer to begin.
_FEW_PAIRS = 64 * 64
# A common prefix is set apart if that saves gathering so many positions: the extra calls cost as much as half of them.
_WORTH_SHARING = 2048


@dataclass(slots=True)
class Gather:
    """How to bring the keys and values of B requests together: the same P positions at first, then L of each one's
    own, padded."""

    cache_rows: torch.Tensor  # int64 [Hkv * (B * own + prefix blocks)]: rows of the cache seen as [NB * Hkv, BS * D]
    own_lens: torch.Tensor  # int64 [B]: positions after the common prefix
    padded_len: int  # L
    prefix_len: int  # P, whole blocks
    masks: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # by window


@dataclass(slots=True)
class DecodeGroup:
    """B requests with one new token each that are computed together."""

    token_rows: torch.Tensor | slice  # [B] rows of the flat batch
    block_table: torch.Tensor  # int32 [B, M]
    seq_lens: torch.Tensor  # int32 [B]
    gather: Gather | None  # None where a kernel reads the blocks where they lie


@dataclass(slots=True)
class PrefillRequest:
    """One request with several new tokens: rows `start:end` of the flat batch."""

    start: int
    end: int
    seq_len: int
    cache_rows: torch.Tensor | None  # int64 [Hkv * blocks]; None when nothing was computed before
    tokens: DecodeGroup | None  # each new token as if it were the newest of a request: for the kernel, if they are few
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class TorchPlan:
    """Per-step preparation."""

    write_rows: torch.Tensor  # int64 [T * Hkv]: rows of the cache seen as [NB * Hkv * BS, D]
    decode: list[DecodeGroup]
    prefill: list[PrefillRequest]


class TorchPagedBackend:
    """See the module. Built by `make_backend`.

    Where the CPU's own kernels are compiled (`kernels/cpu`), they rotate, write the cache and attend for requests with
    one new token.
    """

    def __init__(
        self, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        kernels = compiled_kernels() if device.type == "cpu" else None
        usable = kernels is not None and dtype in kernels.DTYPES and head_dim in kernels.HEAD_SIZES
        self._kernels = kernels if usable else None
        self.fuses_rotary = usable
        self._heads = torch.arange(num_kv_heads, device=device)
        # Gathered keys and values; reused by every layer and step, grown when a group needs more.
        self._scratch = torch.empty(2, 0, dtype=dtype, device=device)

    def allocate_cache(self, num_layers: int, num_blocks: int) -> list[KVCache]:
        """One (keys, values) pair per layer, logical shape [NB, BS, Hkv, D], stored heads first."""
        shape = (num_layers, 2, num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        storage = zeros_on_demand(shape, self.dtype, self.device)
        return [(layer[0].transpose(1, 2), layer[1].transpose(1, 2)) for layer in storage]

    # ---- once per step --------------------------------------------------------------------------

    def plan(self, metadata: AttentionMetadata) -> TorchPlan:
        """Sort the batch into decode groups and prefills, and compute all indices."""
        starts = metadata.query_start_loc_host
        query_lens = np.diff(starts)
        seq_lens = metadata.seq_lens_host
        groups = self._decode_groups(metadata, np.flatnonzero(query_lens == 1))
        prefills = []
        for req in np.flatnonzero(query_lens > 1):
            seq_len, query_len = int(seq_lens[req]), int(query_lens[req])
            rows = None
            if seq_len > query_len:
                num_blocks = -(-seq_len // self.block_size)
                rows = self._cache_rows(metadata.block_table[req : req + 1, :num_blocks])
            tokens = None
            if self._kernels is not None and query_len * seq_len <= _FEW_PAIRS:
                table = metadata.block_table[req].expand(query_len, -1)
                lens = torch.arange(seq_len - query_len + 1, seq_len + 1, dtype=torch.int32)
                tokens = DecodeGroup(slice(None), table, lens, None)
            prefills.append(PrefillRequest(int(starts[req]), int(starts[req + 1]), seq_len, rows, tokens))
        return TorchPlan(self._write_rows(metadata.slot_mapping), groups, prefills)

    def _write_rows(self, slots: torch.Tensor) -> torch.Tensor:
        block, offset = slots // self.block_size, slots % self.block_size
        rows = (block[:, None] * self.num_kv_heads + self._heads) * self.block_size + offset[:, None]
        return rows.reshape(-1)

    def _decode_groups(self, metadata: AttentionMetadata, reqs: np.ndarray) -> list[DecodeGroup]:
        if len(reqs) == 0:
            return []
        if self._kernels is not None:
            return [self._decode_group(metadata, reqs)]
        groups = []
        for members, prefix_len in self._by_common_prefix(metadata, reqs):
            for part in self._split_by_length(members, metadata.seq_lens_host - prefix_len):
                group = self._decode_group(metadata, part)
                group.gather = self._gather_plan(group, int(metadata.seq_lens_host[part].max()), prefix_len)
                groups.append(group)
        return groups

    def _by_common_prefix(self, metadata: AttentionMetadata, reqs: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Sort `reqs` into sets with the length of what they have in common, in positions; 0 for the last set."""
        sets = []
        whole_blocks = (metadata.seq_lens_host - 1) // self.block_size  # the newest token's block is its request's own
        table = metadata.block_table.cpu().numpy()
        while len(reqs) > 1:
            members, num_blocks = _longest_common(table[reqs], whole_blocks[reqs])
            length = num_blocks * self.block_size
            if (len(members) - 1) * length < _WORTH_SHARING:
                break
            sets.append((reqs[members], length))
            reqs = np.delete(reqs, members)
        return [*sets, (reqs, 0)]

    def _split_by_length(self, reqs: np.ndarray, seq_lens: np.ndarray) -> list[np.ndarray]:
        """Cut `reqs`, shortest first, wherever a group would outgrow the gather budget."""
        if len(reqs) == 0:
            return []
        bytes_per_token = 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        if len(reqs) * int(seq_lens[reqs].max()) * bytes_per_token <= _GATHER_BYTES:
            return [reqs]  # in batch order, so that rows need no rearranging
        order = reqs[np.argsort(seq_lens[reqs], kind="stable")]
        groups, start = [], 0
        for end in range(1, len(order) + 1):
            last = end == len(order)
            if last or (end + 1 - start) * int(seq_lens[order[end]]) * bytes_per_token > _GATHER_BYTES:
                groups.append(order[start:end])
                start = end
        return groups

    def _decode_group(self, metadata: AttentionMetadata, reqs: np.ndarray) -> DecodeGroup:
        if len(reqs) == metadata.query_start_loc_host[-1]:  # simply the whole batch
            return DecodeGroup(slice(None), metadata.block_table, metadata.seq_lens, None)
        index = torch.from_numpy(reqs).to(self.device)
        rows = torch.from_numpy(metadata.query_start_loc_host[reqs].astype(np.int64)).to(self.device)
        return DecodeGroup(rows, metadata.block_table[index], metadata.seq_lens[index], None)

    def _gather_plan(self, group: DecodeGroup, longest: int, prefix_len: int) -> Gather:
        first, end = prefix_len // self.block_size, -(-longest // self.block_size)
        cache_rows = self._cache_rows(group.block_table[:, first:end])
        if first:
            cache_rows = torch.cat((cache_rows, self._cache_rows(group.block_table[:1, :first])))
        own_lens = group.seq_lens.long() - prefix_len
        return Gather(cache_rows, own_lens, (end - first) * self.block_size, prefix_len)

    def _cache_rows(self, block_table: torch.Tensor) -> torch.Tensor:
        """block_table [B, n] -> rows [Hkv * B * n] of the cache seen as [NB * Hkv, BS * D]."""
        return (block_table.long() * self.num_kv_heads + self._heads[:, None, None]).reshape(-1)

    # ---- once per layer -------------------------------------------------------------------------

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        plan: TorchPlan = metadata.plan
        caches = [cache.transpose(1, 2) for cache in kv_cache]  # back to how they are stored
        for cache, new in zip(caches, (key, value), strict=True):
            cache.view(-1, self.head_dim).index_copy_(0, plan.write_rows, new.reshape(-1, self.head_dim))
        return self._attend(query, key, value, caches, plan, scale, sliding_window)

    def forward_rotary(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """As `forward`, from unrotated qkv [T, (H + 2 * Hkv) * D] and the rotary table's rows `positions`."""
        self._kernels.rotary_and_cache(qkv, cos_sin, positions, *kv_cache, metadata.slot_mapping)
        heads = qkv.view(len(qkv), -1, self.head_dim)
        query, key, value = heads.tensor_split((-2 * self.num_kv_heads, -self.num_kv_heads), dim=1)
        caches = [cache.transpose(1, 2) for cache in kv_cache]
        return self._attend(query, key, value, caches, metadata.plan, scale, sliding_window)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: list[torch.Tensor],
        plan: TorchPlan,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """query, key and value [T, heads, D], rotated; the last two are in the cache, too. -> [T, H, D]"""
        if len(plan.decode) == 1 and not plan.prefill:
            return self._decode(query, caches, plan.decode[0], scale, sliding_window)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in plan.decode:
            out[group.token_rows] = self._decode(query[group.token_rows], caches, group, scale, sliding_window)
        for request in plan.prefill:
            rows = slice(request.start, request.end)
            out[rows] = self._prefill(query[rows], key[rows], value[rows], caches, request, scale, sliding_window)
        return out

    def _gather(self, caches: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
        """Collect (block, head) rows of keys and of values, each [rows, BS * D]."""
        width = self.block_size * self.head_dim
        if self._scratch.shape[1] < rows.numel() * width:
            self._scratch = torch.empty(2, rows.numel() * width, dtype=self.dtype, device=self.device)
        gathered = [half[: rows.numel() * width].view(-1, width) for half in self._scratch]
        for cache, out in zip(caches, gathered, strict=True):
            torch.index_select(cache.view(-1, width), 0, rows, out=out)
        return gathered

    def _decode(
        self,
        query: torch.Tensor,
        caches: list[torch.Tensor],
        group: DecodeGroup,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """query [B, H, D] -> [B, H, D]."""
        if self._kernels is not None:
            k_cache, v_cache = (cache.transpose(1, 2) for cache in caches)
            return self._kernels.paged_attention_decode(
                query, k_cache, v_cache, group.block_table, group.seq_lens, scale, sliding_window=sliding_window
            )
        gathered = self._gather(caches, group.gather.cache_rows)
        attend = self._attend_behind_prefix if group.gather.prefix_len else self._attend_gathered
        return attend(query, gathered, group.gather, scale, sliding_window)

    def _attend_gathered(
        self,
        query: torch.Tensor,
        gathered: list[torch.Tensor],
        plan: Gather,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Without a common prefix."""
        batch, num_heads, head_dim = query.shape
        kv_heads, heads_per_kv = self.num_kv_heads, num_heads // self.num_kv_heads
        key, value = (t.view(kv_heads * batch, -1, head_dim) for t in gathered)
        packed = query.view(batch, kv_heads, heads_per_kv, head_dim).transpose(0, 1).reshape(-1, heads_per_kv, head_dim)
        mask, _ = self._decode_masks(plan, sliding_window, heads_per_kv)
        if batch * plan.padded_len <= _FEW_POSITIONS and self.dtype.itemsize < 4:
            # oneDNN spends a tenth of a millisecond on preparing a product of 16-bit numbers, however small
            per_head = (t.view(kv_heads, batch, -1, head_dim) for t in (packed, key, value))
            four = mask.view(kv_heads, batch, 1, -1).expand(-1, -1, heads_per_kv, -1)
            out = F.scaled_dot_product_attention(*per_head, attn_mask=four, scale=scale)
        else:
            scores = torch.baddbmm(mask, packed, key.transpose(1, 2), alpha=scale)
            out = torch.bmm(torch.softmax(scores, dim=-1), value)
        return out.view(kv_heads, batch, heads_per_kv, head_dim).transpose(0, 1).reshape(query.shape)

    def _attend_behind_prefix(
        self,
        query: torch.Tensor,
        gathered: list[torch.Tensor],
        plan: Gather,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """With one product for the common positions of all requests, and one softmax over both parts."""
        batch, num_heads, head_dim = query.shape
        kv_heads, heads_per_kv = self.num_kv_heads, num_heads // self.num_kv_heads
        own_rows = kv_heads * batch * plan.padded_len // self.block_size
        key, value = (t[:own_rows].view(kv_heads * batch, -1, head_dim) for t in gathered)
        first_key, first_value = (t[own_rows:].view(kv_heads, -1, head_dim) for t in gathered)
        by_head = query.view(batch, kv_heads, heads_per_kv, head_dim).transpose(0, 1).contiguous()
        packed, together = by_head.view(-1, heads_per_kv, head_dim), by_head.view(kv_heads, -1, head_dim)
        mask, first_mask = self._decode_masks(plan, sliding_window, heads_per_kv)
        first_scores = torch.baddbmm(first_mask, together, first_key.transpose(1, 2), alpha=scale)
        scores = torch.baddbmm(mask, packed, key.transpose(1, 2), alpha=scale)
        both = torch.cat((first_scores.view(len(packed), heads_per_kv, -1), scores), dim=-1)
        first_weights, weights = torch.softmax(both, dim=-1).split((plan.prefix_len, plan.padded_len), dim=-1)
        out = torch.bmm(first_weights.reshape(first_scores.shape), first_value).view(packed.shape)
        out = torch.baddbmm(out, weights, value)
        return out.view(by_head.shape).transpose(0, 1).reshape(query.shape)

    def _decode_masks(
        self, plan: Gather, sliding_window: int | None, heads_per_kv: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Additive, 0 where the newest token may look, -inf elsewhere: [Hkv * B, 1, L] for the requests' own positions,
        [1, B * H / Hkv, P] or, as nothing is hidden without a window, [1, 1, 1] for the common ones."""
        masks = plan.masks.get(sliding_window)
        if masks is None:
            positions = torch.arange(plan.padded_len, device=self.device)
            lengths = plan.own_lens[:, None]
            hidden = positions >= lengths
            common = torch.zeros(1, 1, 1, dtype=self.dtype, device=self.device)
            if sliding_window is not None:
                hidden |= positions < lengths - sliding_window
                outside = torch.arange(-plan.prefix_len, 0, device=self.device) < lengths - sliding_window
                common = self._additive(outside.repeat_interleave(heads_per_kv, dim=0))[None]
            masks = self._additive(hidden).repeat(self.num_kv_heads, 1)[:, None], common
            plan.masks[sliding_window] = masks
        return masks

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill_(hidden, float("-inf"))

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: list[torch.Tensor],
        request: PrefillRequest,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """One request's new tokens: query [n, H, D] -> [n, H, D]."""
        if request.tokens is not None:
            return self._decode(query, caches, request.tokens, scale, sliding_window)
        num_new, num_heads, head_dim = query.shape
        if request.cache_rows is None:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
        else:
            key, value = (
                t.view(self.num_kv_heads, -1, head_dim)[:, : request.seq_len]
                for t in self._gather(caches, request.cache_rows)
            )
        # Batch = KV heads, "heads" = the query heads of one KV head; K and V are expanded, not copied.
        query = query.view(num_new, self.num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        key, value = (t[:, None].expand(-1, query.shape[1], -1, -1) for t in (key, value))
        mask = self._prefill_mask(request, sliding_window)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        return out.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)

    def _prefill_mask(self, request: PrefillRequest, sliding_window: int | None) -> torch.Tensor | None:
        """Boolean [n, L], True where a query may look; None when plain causal masking says it all."""
        if sliding_window not in request.masks:
            num_new, length = request.end - request.start, request.seq_len
            windowed = sliding_window is not None and length > sliding_window
            mask = None
            if windowed or num_new < length:
                query_pos = torch.arange(length - num_new, length, device=self.device)[:, None]
                key_pos = torch.arange(length, device=self.device)
                mask = key_pos <= query_pos
                if windowed:
                    mask &= key_pos > query_pos - sliding_window
            request.masks[sliding_window] = mask
        return request.masks[sliding_window]


def _longest_common(table: np.ndarray, whole_blocks: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of a block table that begin alike, and in how many blocks: such that rows times blocks is large.

    Goes with the majority wherever the rows part, and returns to where most was saved.

    Args:
        table: [R, M].
        whole_blocks: [R], how many of a row's blocks may be common.
    """
    members, depth = np.arange(len(table)), 0
    best = members, depth
    while len(members) > 1:
        rows = table[members, depth : whole_blocks[members].min()]
        differ = (rows != rows[0]).any(axis=0)
        depth += int(differ.argmax()) if differ.any() else len(differ)
        if (len(members) - 1) * depth > (len(best[0]) - 1) * best[1]:
            best = members, depth
        members = members[whole_blocks[members] > depth]
        if len(members) == 0:
            break
        blocks, counts = np.unique(table[members, depth], return_counts=True)
        members = members[table[members, depth] == blocks[counts.argmax()]]
    return best
