"""What a router knows of an engine's prefix cache: built from KV events and nothing else."""

from __future__ import annotations

from course_lib.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent


class KVMirror:
    """`blocks`: of every cached hash, its parent's hash and its tokens. A listener to KV events."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, tuple[bytes | None, tuple[int, ...]]] = {}
        self.kinds: dict[type, int] = {BlockStored: 0, BlockRemoved: 0, AllBlocksCleared: 0}

    def __call__(self, events: list[KVEvent]) -> None:
        for event in events:
            self.kinds[type(event)] += 1
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                for content_hash in event.block_hashes:
                    del self.blocks[content_hash]
            else:
                self.blocks.clear()

    def _store(self, event: BlockStored) -> None:
        parent, size = event.parent_block_hash, event.block_size
        assert len(event.token_ids) == size * len(event.block_hashes) == size * len(event.extra_keys) > 0
        for i, content_hash in enumerate(event.block_hashes):
            assert content_hash not in self.blocks, "stored twice"
            self.blocks[content_hash] = parent, tuple(event.token_ids[i * size : (i + 1) * size])
            parent = content_hash
