"""What happens to the prefix cache, told to whoever wants to know.

A router that sends each request to the engine with the longest cached prefix needs to know what every
engine holds. It does not ask: the engine reports each block that becomes findable and each that ceases
to be, and the router keeps a mirror.

Invariant: whoever has applied all events, from the first on, knows exactly the pool's cached hashes. So a
listener begins with an empty cache, and an engine that starts over says so. Nothing is recorded while
nobody listens.

vLLM: `vllm/distributed/kv_events.py`, `vllm/v1/core/block_pool.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from course_lib.core.prefix_hash import ExtraKeys, block_extra_keys

if TYPE_CHECKING:
    from course_lib.core.block_pool import BlockPool
    from course_lib.core.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks that follow each other in one chain can be found from now on."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None  # None: the first of them begins a prompt
    token_ids: list[int]  # of all the blocks, one after another
    block_size: int
    lora_name: str | None
    extra_keys: list[ExtraKeys]  # one entry per block


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks can no longer be found: evicted, or withdrawn before they were computed."""

    block_hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is cached any more."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared
KVListener = Callable[[list[KVEvent]], None]


def stored_events(request: Request, indices: list[int], block_size: int) -> list[KVEvent]:
    """Events for those blocks of `request` (ascending indices) that were offered and had no twin: one for each run
    of neighbours."""
    runs: list[range] = []
    for i in indices:
        if runs and runs[-1].stop == i:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    lora = request.cache_keys.lora if request.cache_keys is not None else None
    return [
        BlockStored(
            block_hashes=request.block_hashes[run.start : run.stop],
            parent_block_hash=request.block_hashes[run.start - 1] if run.start else None,
            token_ids=request.token_ids[run.start * block_size : run.stop * block_size],
            block_size=block_size,
            lora_name=lora[0] if lora is not None else None,
            extra_keys=[block_extra_keys(request, i, block_size) for i in run],
        )
        for run in runs
    ]


class KVEventFeed:
    """Passes the events of an engine's pool on to its listeners. A pool may be replaced by an empty one."""

    def __init__(self) -> None:
        self._listeners: list[KVListener] = []
        self._pool: BlockPool | None = None

    def follow(self, pool: BlockPool) -> None:
        """Report about `pool` from now on; it is new, so whatever was cached elsewhere is gone."""
        self._pool = pool
        if self._listeners:
            pool.events = [AllBlocksCleared()]
            self.publish()

    def subscribe(self, listener: KVListener) -> Callable[[], None]:
        """Report to `listener` too; the cache must be empty. Returns a function that ends it."""
        self._listeners.append(listener)
        if self._pool.events is None:
            self._pool.events = []

        def unsubscribe() -> None:
            if listener in self._listeners:
                self._listeners.remove(listener)
            if not self._listeners:
                self._pool.events = None

        return unsubscribe

    def publish(self) -> None:
        """Hand everybody what has happened since the last call, if anything has.

        A listener that fails is logged and hears the next events all the same: it must not harm the engine.
        """
        if not self._listeners or not self._pool.events:
            return
        events, self._pool.events = self._pool.events, []
        for listener in list(self._listeners):
            try:
                listener(events)
            except Exception:
                logger.exception("a listener to KV events failed; what it keeps may be wrong from now on")
