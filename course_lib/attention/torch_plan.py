"""What `torch_paged` prepares once per step for all layers: who is computed with whom, and where everything lies.

Requests with one new token form groups: all of them where a kernel reads the blocks where they lie; where keys and
values are gathered, those of similar length, and those that begin with the same blocks. Which ones do is seen in the
block tables. Invariant: every new token is in exactly one group or prefill.

vLLM: the metadata builders of `vllm/v1/attention/backends/`. Common prefixes: Hydragen (arXiv:2402.05099); vLLM's
`use_cascade_attention`, only where all requests of a batch have the prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from course_lib.attention.metadata import AttentionMetadata

# Keys plus values gathered at a time, in bytes: half of a common last-level cache. Half as much was
# slower (more calls), half as much again no faster.
_GATHER_BYTES = 16 << 20
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


class TorchPlanner:
    """Args:
    bytes_per_token: of keys and values, in one layer.
    gathers: whether decode groups are gathered; otherwise a kernel reads them where they lie.
    """

    def __init__(
        self, block_size: int, num_kv_heads: int, bytes_per_token: int, device: torch.device, *, gathers: bool
    ) -> None:
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        self.bytes_per_token = bytes_per_token
        self.device = device
        self.gathers = gathers
        self._heads = torch.arange(num_kv_heads, device=device)

    def plan(self, metadata: AttentionMetadata) -> TorchPlan:
        """The whole step's preparation."""
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
            if not self.gathers and query_len * seq_len <= _FEW_PAIRS:
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
        if not self.gathers:
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
        if len(reqs) * int(seq_lens[reqs].max()) * self.bytes_per_token <= _GATHER_BYTES:
            return [reqs]  # in batch order, so that rows need no rearranging
        order = reqs[np.argsort(seq_lens[reqs], kind="stable")]
        groups, start = [], 0
        for end in range(1, len(order) + 1):
            last = end == len(order)
            if last or (end + 1 - start) * int(seq_lens[order[end]]) * self.bytes_per_token > _GATHER_BYTES:
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
