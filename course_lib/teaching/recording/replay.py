"""Requests sent through the engine's prefix cache without a model: what is found depends on tokens alone.

Each is asked when the one before has ended, for one token. Owns the replay of such requests at any size of the cache,
and what was noted of it; pictures are drawn elsewhere.

Invariant: the cache is the engine's own `KVCacheManager`, with whatever is patched into it at the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.prefix_hash import ROOT, CacheKeys
from course_lib.core.request import Request
from course_lib.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Replay:
    """What became of some requests in a cache of `num_blocks` blocks, in the order in which they were asked."""

    num_blocks: int
    prompt_tokens: tuple[int, ...]
    found_tokens: tuple[int, ...]  # in the cache, so not computed
    num_evictions: int  # blocks whose content was forgotten

    @property
    def hit_rate(self) -> float:
        """Tokens found, of all prompt tokens: 0 to 1."""
        return sum(self.found_tokens) / sum(self.prompt_tokens)

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not found."""
        return sum(self.prompt_tokens) - sum(self.found_tokens)


def replay(
    prompts: Sequence[list[int]], num_blocks: int, *, block_size: int = 16, salts: Sequence[str] | None = None
) -> Replay:
    """Ask `prompts` (token ids) one after the other, in a cache that is empty at first.

    Args:
        salts: of each request; requests of different salts share nothing. None: no salts.

    Raises:
        ValueError: a prompt does not fit in the cache.
    """
    cache = KVCacheManager(num_blocks, block_size)
    keys = [CacheKeys(salt=salt) for salt in salts] if salts else None
    found = []
    for i, prompt in enumerate(prompts):
        with _running(cache, str(i), prompt, keys[i] if keys else None) as (_, num_found):
            found.append(num_found)
    return Replay(num_blocks, tuple(map(len, prompts)), tuple(found), cache.pool.num_evictions)


@contextmanager
def _running(
    cache: KVCacheManager, name: str, prompt: list[int], keys: CacheKeys | None = None
) -> Iterator[tuple[Request, int]]:
    """Inside the block a request runs: it, and how many of its tokens were found."""
    request = Request(name, prompt, SamplingParams(max_tokens=1), cache_keys=keys)
    hit = cache.get_computed_blocks(request)
    num_found = len(hit) * cache.block_size
    if cache.allocate_slots(request, len(prompt) - num_found, hit) is None:
        raise ValueError(
            f"num_blocks={cache.pool.num_blocks}: request {name} has {len(prompt)} tokens, which do not fit"
        )
    request.num_computed_tokens = len(prompt)
    yield request, num_found
    cache.free(request)


Sweeps = Mapping[tuple[str, ...], Sequence[Replay]]  # what was varied -> replays by ascending size


def sweep(traffic: Mapping[str, Sequence[tuple[list[int], int]]], sizes: Sequence[int]) -> Sweeps:
    """Replay each kind of traffic in the order of arrival and with equal beginnings put together, without salts, with
    two for all and with one for each who asks, at every size.

    Args:
        traffic: name -> (prompt, number of who asks) in the order of arrival.

    Returns:
        (kind of traffic, order, salts) -> replays.
    """
    found = {}
    for kind, arrivals in traffic.items():
        for order, asked in (("as they come", arrivals), ("put together", sorted(arrivals))):
            prompts, owners = zip(*asked, strict=True)
            salted = {
                "no salts": None,
                "two companies": [str(one % 2) for one in owners],
                "a salt each": [str(one) for one in owners],
            }
            for how, salts in salted.items():
                found[kind, order, how] = [replay(prompts, size, salts=salts) for size in sizes]
    return found


@dataclass(frozen=True, slots=True)
class Moment:
    """The free queue after something happened: (block id, what it still holds or "") from the front on."""

    event: str
    queue: tuple[tuple[int, str], ...]


def watch_queue(
    texts: Mapping[str, Sequence[str]], num_blocks: int, token_ids: Callable[[str], list[int]]
) -> list[Moment]:
    """Replay requests, each given by its name and the texts of its blocks, which have equally many tokens, and note
    the free queue when each has begun and when it has ended.

    Raises:
        ValueError: a request does not fit in the cache.
    """
    blocks = {name: [token_ids(text) for text in parts] for name, parts in texts.items()}
    cache = KVCacheManager(num_blocks, len(next(iter(blocks.values()))[0]))
    contents: dict[bytes, str] = {}
    moments = []

    def note(event: str) -> None:
        queue = ((block.block_id, contents.get(block.content_hash or b"", "")) for block in cache.pool.free_queue)
        moments.append(Moment(event, tuple(queue)))

    for name, parts in texts.items():
        with _running(cache, name, [*chain.from_iterable(blocks[name])]) as (request, num_found):
            contents.update(zip(request.block_hashes, parts, strict=True))
            note(f"{name} runs, {num_found // cache.block_size} found")
        note(f"{name} has ended")
    return moments


def find_forgery(block: Sequence[int], name: Callable[[bytes, list[int]], bytes]) -> tuple[list[int], int]:
    """Another first block of a prompt with the same `name(ROOT, tokens)`, found by trying, and after how many tries.

    Only for names of few bits: with b of them it takes about 2**b tries.
    """
    target, forged = name(ROOT, list(block)), list(range(1000, 1000 + len(block)))
    tries = 0
    while forged == list(block) or name(ROOT, forged) != target:
        tries += 1
        forged[-2:] = 1000 + tries // 40_000, 1000 + tries % 40_000
    return forged, tries
