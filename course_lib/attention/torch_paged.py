"""Paged attention on a CPU: in plain torch, and where they are compiled by kernels of our own (`kernels/cpu`).

Requests with one new token are what the kernels are for: they read keys and values in the blocks where they lie.
Without them, four things make plain torch quick:
* The cache is stored heads before offsets, `[blocks, Hkv, block size, D]`, so that one gather of
  whole (block, head) rows yields contiguous keys per head, which batched matrix products want.
* Requests with one new token are gathered and computed together, in groups of similar length that
  fit the processor's cache: gathered bytes are then read back from there and not from memory.
* What many of them have in common (a cached prefix) is gathered once, and all their queries meet it in one product.
* Everything that depends only on the step (indices, masks, groups) is computed once, not per layer: `torch_plan`.

The query heads that share a KV head ride along as extra query rows, so nothing is repeated for GQA.

vLLM: `vllm/v1/attention/backends/cpu_attn.py` does the same job with C++ kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from course_lib.attention.backend import KVCache, zeros_on_demand
from course_lib.attention.metadata import AttentionMetadata
from course_lib.attention.torch_plan import DecodeGroup, Gather, PrefillRequest, TorchPlan, TorchPlanner
from kernels.cpu import compiled_kernels

# Up to so many positions of a decode group, scaled_dot_product_attention beats two products and a softmax in 16 bits.
_FEW_POSITIONS = 1024


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
        bytes_per_token = 2 * num_kv_heads * head_dim * dtype.itemsize
        self._planner = TorchPlanner(block_size, num_kv_heads, bytes_per_token, device, gathers=not usable)
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
        return self._planner.plan(metadata)

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
        for cache, new in zip(kv_cache, (key, value), strict=True):
            rows = _as_stored(cache, self.head_dim)
            rows.index_copy_(0, plan.write_rows, new.reshape(-1, self.head_dim))
        return self._attend(query, key, value, kv_cache, plan, scale, sliding_window)

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
        num_tokens, width = qkv.shape
        sizes = (width // self.head_dim - 2 * self.num_kv_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = qkv.view(num_tokens, -1, self.head_dim).split_with_sizes(sizes, dim=1)
        return self._attend(query, key, value, kv_cache, metadata.plan, scale, sliding_window)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: KVCache,
        plan: TorchPlan,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """query, key and value [T, heads, D], rotated; the last two are in the cache, too. -> [T, H, D]"""
        if len(plan.decode) == 1 and not plan.prefill:
            return self._decode(query, kv_cache, plan.decode[0], scale, sliding_window)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for group in plan.decode:
            out[group.token_rows] = self._decode(query[group.token_rows], kv_cache, group, scale, sliding_window)
        for request in plan.prefill:
            rows = slice(request.start, request.end)
            out[rows] = self._prefill(query[rows], key[rows], value[rows], kv_cache, request, scale, sliding_window)
        return out

    def _gather(self, kv_cache: KVCache, rows: torch.Tensor) -> list[torch.Tensor]:
        """Collect (block, head) rows of keys and of values, each [rows, BS * D]."""
        width = self.block_size * self.head_dim
        if self._scratch.shape[1] < rows.numel() * width:
            self._scratch = torch.empty(2, rows.numel() * width, dtype=self.dtype, device=self.device)
        gathered = [half[: rows.numel() * width].view(-1, width) for half in self._scratch]
        for cache, out in zip(kv_cache, gathered, strict=True):
            torch.index_select(_as_stored(cache, width), 0, rows, out=out)
        return gathered

    def _decode(
        self,
        query: torch.Tensor,
        kv_cache: KVCache,
        group: DecodeGroup,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """query [B, H, D] -> [B, H, D]."""
        if self._kernels is not None:
            return self._kernels.paged_attention_decode(
                query, *kv_cache, group.block_table, group.seq_lens, scale, sliding_window=sliding_window
            )
        gathered = self._gather(kv_cache, group.gather.cache_rows)
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
        kv_cache: KVCache,
        request: PrefillRequest,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """One request's new tokens: query [n, H, D] -> [n, H, D]."""
        if request.tokens is not None:
            return self._decode(query, kv_cache, request.tokens, scale, sliding_window)
        num_new, num_heads, head_dim = query.shape
        if request.cache_rows is None:
            key, value = key.transpose(0, 1), value.transpose(0, 1)
        else:
            key, value = (
                t.view(self.num_kv_heads, -1, head_dim)[:, : request.seq_len]
                for t in self._gather(kv_cache, request.cache_rows)
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


def _as_stored(cache: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [NB, BS, Hkv, D] as rows of `width` numbers, in the order in which they lie in memory."""
    return cache.transpose(1, 2).view(-1, width)
