"""Gives requests room in the paged cache, and finds what is already there.

Owns the block pool and edits the requests' block tables; nobody else does. A request's tokens
`[16 i, 16 i + 16)` (block size 16) live in block `block_ids[i]`. Blocks that will be full after the
step being planned are offered to the prefix cache at once: a request planned later in the same step
may share them, because every layer writes all new keys and values before any attention reads them.
What the cache saved is counted in `stats`; what it holds can be followed through the pool's `events`.

Invariants: the pool's; reference counts equal the number of tables that hold a block; a registered
block's hash chains from its parent's.

vLLM: `vllm/v1/core/kv_cache_manager.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from course_lib.core.block_pool import BlockPool
from course_lib.core.kv_events import stored_events
from course_lib.core.prefix_cache_stats import PrefixCacheStats
from course_lib.core.prefix_hash import ROOT, block_extra_keys, extend_block_hashes, hash_block
from course_lib.core.request import Request


class KVCacheManager:
    """Args:
    num_blocks: blocks in the cache.
    block_size: tokens per block, a power of two.
    enable_caching: look up and offer shared prefixes.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True) -> None:
        self.block_size = block_size
        self.enable_caching = enable_caching
        self.pool = BlockPool(num_blocks)
        self.stats = PrefixCacheStats()

    @property
    def usage(self) -> float:
        """Fraction of blocks held by requests, 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    def get_computed_blocks(self, request: Request) -> list[int]:
        """Longest chain of cached blocks that starts `request`, by block id.

        At least one token is always left to compute, since a step must produce logits for the last
        one: a prompt of exactly three cached blocks reuses two. Requests that want prompt
        log-probabilities need every position's logits, so they reuse nothing.
        """
        if not self.enable_caching or request.needs_prompt_logprobs:
            return []
        extend_block_hashes(request, self.block_size)
        hit: list[int] = []
        max_blocks = (request.num_tokens - 1) // self.block_size
        for content_hash in request.block_hashes[:max_blocks]:
            block_id = self.pool.find(content_hash)
            if block_id is None:
                break
            hit.append(block_id)
        return hit

    def record_lookup(self, num_tokens: int, num_hit_tokens: int) -> None:
        """Count one admitted request's lookup (a request that is looked up again each step while it
        waits for room must count once, so this is not done in `get_computed_blocks`)."""
        if self.enable_caching:
            self.stats.record(num_tokens, num_hit_tokens)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, computed_blocks: list[int] | None = None
    ) -> list[int] | None:
        """Make room for `num_new_tokens` more tokens after the computed ones.

        Args:
            computed_blocks: prefix-cache hit to take over first (only for a request without blocks).

        Returns:
            Ids of the freshly taken blocks, or None (and nothing changed) when there are too few.
        """
        computed = request.num_computed_tokens
        table = request.block_ids
        block_size = self.block_size
        pool = self.pool
        new_blocks: list[int] = []
        if computed_blocks:
            computed += len(computed_blocks) * block_size
            needed = -(-(computed + num_new_tokens) // block_size) - len(computed_blocks)
            # Hit blocks that nobody holds lie in the free queue: they are not there to be taken.
            reserved = sum(map(pool.is_free, computed_blocks))
            if needed > pool.num_free - reserved:
                return None
            pool.share(computed_blocks)
            table.extend(computed_blocks)
            request.num_computed_tokens = computed
            request.num_registered_blocks = len(computed_blocks)
        else:
            needed = -(-(computed + num_new_tokens) // block_size) - len(table)
            if needed > pool.num_free:
                return None
        if needed > 0:
            new_blocks = pool.allocate(needed)
            table.extend(new_blocks)
        full = (computed + num_new_tokens) // block_size
        if full > request.num_registered_blocks and self.enable_caching:
            extend_block_hashes(request, block_size)
            # A step scheduled ahead may fill a block with a token that is not known yet: offered next time.
            hashes = request.block_hashes
            full = min(full, len(hashes))
            offered = []
            for i in range(request.num_registered_blocks, full):
                if pool.register(table[i], hashes[i]):
                    offered.append(i)
            request.num_registered_blocks = full
            if pool.events is not None:
                pool.events += stored_events(request, offered, block_size)
        return new_blocks

    def free(self, request: Request) -> None:
        """Take back all blocks of `request`; computed full blocks stay findable until evicted.

        Blocks registered for a step that will not run (a request preempted while the step is being
        planned) hold nothing yet, and are withdrawn.
        """
        computed_blocks = request.num_computed_tokens // self.block_size
        for block_id in request.block_ids[computed_blocks : request.num_registered_blocks]:
            self.pool.unregister(block_id)
        self.pool.release(reversed(request.block_ids))
        request.block_ids = []
        request.num_registered_blocks = 0

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if requests still hold blocks."""
        if not self.pool.reset_cache():
            return False
        self.stats.forget_recent()
        return True

    def check_invariants(self, requests: Iterable[Request]) -> None:
        """Raise AssertionError naming the first broken invariant; `requests` are all live ones."""
        self.pool.check_invariants()
        holders: Counter[int] = Counter()
        for request in requests:
            holders.update(request.block_ids)
            room = len(request.block_ids) * self.block_size
            assert request.num_computed_tokens <= room, f"{request}: computed tokens exceed {room} slots"
            assert request.num_computed_tokens <= request.num_tokens, f"{request}: computed > total"
            self._check_chain(request)
        for block in self.pool.blocks:
            assert block.ref_count == holders[block.block_id], (
                f"block {block.block_id}: reference count {block.ref_count}, "
                f"held by {holders[block.block_id]} tables"
            )

    def _check_chain(self, request: Request) -> None:
        parent = ROOT
        size = self.block_size
        for i, content_hash in enumerate(request.block_hashes):
            tokens = request.token_ids[i * size : (i + 1) * size]
            parent = hash_block(parent, tokens, block_extra_keys(request, i, size))
            assert parent == content_hash, f"{request}: hash of block {i} does not chain from its parent"
        for i in range(request.num_registered_blocks):
            held = self.pool.blocks[request.block_ids[i]].content_hash
            assert held in (None, request.block_hashes[i]), f"{request}: block {i} holds other content"
