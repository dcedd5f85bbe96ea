"""All KV blocks of one engine: who holds them, which are free, which hold reusable content.

The free blocks form a doubly linked queue in eviction order, so that taking the oldest, returning a
block, and *pulling a cached block out of the middle* when a prefix hit revives it are all O(1).
A block keeps its content hash while it lies in the free queue: that is the prefix cache. It loses
the hash when it is handed out again (the content is *evicted*).

Invariants: free + used = total; a block is in the free queue exactly when its reference count is 0;
`cached[h]` is a block whose `content_hash` is h.

vLLM: `vllm/v1/core/block_pool.py`, `kv_cache_utils.py` (`FreeKVCacheBlockQueue`).
"""

from __future__ import annotations

from collections.abc import Iterable

from course_lib.core.kv_events import AllBlocksCleared, BlockRemoved, KVEvent


class KVBlock:
    """One block's bookkeeping; the tensors live in the runner."""

    __slots__ = ("block_id", "ref_count", "content_hash", "prev", "next")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.content_hash: bytes | None = None
        self.prev: KVBlock | None = None  # neighbours in the free queue, None when not in it
        self.next: KVBlock | None = None


class FreeBlockQueue:
    """Doubly linked list of free blocks; the head is evicted first.

    Two sentinels at the ends spare every operation the "is it the first or last?" question.
    """

    def __init__(self, blocks: Iterable[KVBlock]) -> None:
        self._head, self._tail = KVBlock(-1), KVBlock(-1)
        self._head.next, self._tail.prev = self._tail, self._head
        self.num_blocks = 0
        for block in blocks:
            self.append(block)

    def append(self, block: KVBlock) -> None:
        """Put `block` where it will be evicted last."""
        last = self._tail.prev
        block.prev, block.next = last, self._tail
        last.next = self._tail.prev = block
        self.num_blocks += 1

    def remove(self, block: KVBlock) -> None:
        """Take `block` out, wherever it is."""
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self.num_blocks -= 1

    def popleft(self) -> KVBlock:
        """Take the block to evict. The caller has checked that there is one."""
        block = self._head.next
        self.remove(block)
        return block

    def __iter__(self):
        block = self._head.next
        while block is not self._tail:
            yield block
            block = block.next


class BlockPool:
    """Hands out, shares and takes back blocks.

    Args:
        num_blocks: how many blocks the cache tensors have.

    Attributes:
        num_evictions: cached contents given up for new ones, since the pool was made.
        events: what happened to the cached contents, while somebody wants to know; None: nobody does.
            New contents are reported by the KV cache manager, which knows their tokens.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.blocks = [KVBlock(i) for i in range(num_blocks)]
        self.free_queue = FreeBlockQueue(self.blocks)
        self.cached: dict[bytes, KVBlock] = {}
        self.num_evictions = 0
        self.events: list[KVEvent] | None = None

    @property
    def num_free(self) -> int:
        return self.free_queue.num_blocks

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks (the caller has checked `num_free`); what they cached is evicted."""
        ids = []
        for _ in range(count):
            block = self.free_queue.popleft()
            if block.content_hash is not None:
                self._forget(block)
                self.num_evictions += 1
            block.ref_count = 1
            ids.append(block.block_id)
        return ids

    def find(self, content_hash: bytes) -> int | None:
        """Id of the block that caches `content_hash`, if any."""
        block = self.cached.get(content_hash)
        return None if block is None else block.block_id

    def is_free(self, block_id: int) -> bool:
        return self.blocks[block_id].ref_count == 0

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each block, pulling it out of the free queue if it lay there."""
        for block_id in block_ids:
            block = self.blocks[block_id]
            if block.ref_count == 0:
                self.free_queue.remove(block)
            block.ref_count += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one holder from each block, in the given order.

        Blocks of a finished request come tail first: the head of a chain is then evicted last, and
        a head without its tail is still useful while a tail without its head is not.
        """
        for block_id in block_ids:
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_queue.append(block)

    def register(self, block_id: int, content_hash: bytes) -> bool:
        """Offer a full block for reuse. The first block of a given content wins; twins stay private (False)."""
        if content_hash in self.cached:
            return False
        block = self.blocks[block_id]
        block.content_hash = content_hash
        self.cached[content_hash] = block
        return True

    def unregister(self, block_id: int) -> None:
        """Withdraw a block whose content will not be computed after all."""
        block = self.blocks[block_id]
        if block.content_hash is not None:
            self._forget(block)

    def reset_cache(self) -> bool:
        """Forget all cached content. Refused (False) while any block is in use."""
        if self.num_free != self.num_blocks:
            return False
        for block in self.cached.values():
            block.content_hash = None
        self.cached.clear()
        if self.events is not None:
            self.events.append(AllBlocksCleared())
        return True

    def _forget(self, block: KVBlock) -> None:
        del self.cached[block.content_hash]
        if self.events is not None:
            self.events.append(BlockRemoved([block.content_hash]))
        block.content_hash = None

    def check_invariants(self) -> None:
        """Raise AssertionError naming the first broken invariant. O(number of blocks)."""
        free = {block.block_id for block in self.free_queue}
        assert len(free) == self.num_free, f"free queue holds {len(free)} blocks, counts {self.num_free}"
        for block in self.blocks:
            assert (block.ref_count == 0) == (block.block_id in free), (
                f"block {block.block_id}: reference count {block.ref_count}, "
                f"{'in' if block.block_id in free else 'not in'} the free queue"
            )
            if block.content_hash is not None:
                assert self.cached.get(block.content_hash) is block, f"block {block.block_id}: hash not in map"
        for content_hash, block in self.cached.items():
            assert block.content_hash == content_hash, f"cache entry points at block {block.block_id}"
