"""The prefix cache as a whole: who shares with whom, who is evicted first, what is counted and reported."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from course_lib.core.prefix_cache_stats import WINDOW, PrefixCacheStats
from course_lib.core.prefix_hash import CacheKeys, MediaSpan
from course_lib.core.request import Request
from course_lib.sampling_params import SamplingParams
from tests.kv_mirror import KVMirror

SIZE = 4
IMAGE = 500  # the placeholder token


def make_request(tokens: list[int], keys: CacheKeys | None = None) -> Request:
    return Request("r", tokens, SamplingParams(max_tokens=8), cache_keys=keys)


def serve(manager: KVCacheManager, tokens: list[int], keys: CacheKeys | None = None) -> Request:
    """Admit a request and compute its whole prompt; it keeps its blocks."""
    request = make_request(tokens, keys)
    hit = manager.get_computed_blocks(request)
    assert manager.allocate_slots(request, len(tokens) - len(hit) * SIZE, hit) is not None
    request.num_computed_tokens = len(tokens)
    return request


def num_hit(manager: KVCacheManager, tokens: list[int], keys: CacheKeys | None = None) -> int:
    """How many tokens a request would find."""
    return SIZE * len(manager.get_computed_blocks(make_request(tokens, keys)))


# ---- who shares with whom --------------------------------------------------------------------------


def test_tenants_and_adapters_never_share() -> None:
    prompt = list(range(13))
    users = [
        None,
        CacheKeys(salt="one tenant"),
        CacheKeys(salt="another"),
        CacheKeys(lora=("sql", "/a")),
        CacheKeys(lora=("sql", "/b")),
        CacheKeys(lora=("chat", "/a")),
        CacheKeys(salt="one tenant", lora=("sql", "/a")),
    ]
    manager = KVCacheManager(64, SIZE)
    for i, keys in enumerate(users):
        assert [num_hit(manager, prompt, other) for other in users] == [12] * i + [0] * (len(users) - i)
        serve(manager, prompt, keys)
    assert all(num_hit(manager, prompt, keys) == 12 for keys in users)


def test_an_image_is_found_in_its_place_and_nowhere_else() -> None:
    """Every token of these prompts is a placeholder: only the keys tell the images apart."""
    prompt = [IMAGE] * 17

    def cat(offset: int, length: int = 6) -> CacheKeys:
        return CacheKeys(media=(MediaSpan("cat", offset, length),))

    manager = KVCacheManager(64, SIZE)
    serve(manager, prompt, cat(5))
    assert num_hit(manager, prompt, cat(5)) == 16
    assert num_hit(manager, prompt, cat(6)) == 4, "only the block before it is the same"
    assert num_hit(manager, prompt, cat(9)) == 4, "a block later, at the same place within its block"
    assert num_hit(manager, prompt, CacheKeys(media=(MediaSpan("dog", 5, 6),))) == 4
    assert num_hit(manager, prompt) == 4
    assert num_hit(manager, prompt, cat(5, length=8)) == 12, "the longer span reaches into the block behind"
    two = CacheKeys(media=(MediaSpan("cat", 5, 6), MediaSpan("dog", 11, 2)))
    assert num_hit(manager, prompt, two) == 8, "another image in its last block"


def test_requests_with_prompt_logprobs_reuse_nothing_but_can_be_reused() -> None:
    manager = KVCacheManager(16, SIZE)
    asks = Request("a", list(range(9)), SamplingParams(prompt_logprobs=1))
    for _ in range(2):
        assert manager.get_computed_blocks(asks) == []
        manager.allocate_slots(asks, 9)
        asks.num_computed_tokens = 9
        manager.free(asks)
        asks.num_computed_tokens = 0
    assert num_hit(manager, list(range(9))) == 8


# ---- who is evicted --------------------------------------------------------------------------------


def test_the_head_of_a_chain_outlives_its_tail() -> None:
    manager = KVCacheManager(6, SIZE)
    prompt = list(range(24))
    manager.free(serve(manager, prompt))
    found = []
    for _ in range(6):
        found.append(num_hit(manager, [*prompt, 99]))
        manager.pool.allocate(1)
    assert found == [24, 20, 16, 12, 8, 4] and num_hit(manager, [*prompt, 99]) == 0
    assert manager.pool.num_evictions == 6


def test_between_requests_the_least_recently_used_goes_first() -> None:
    manager = KVCacheManager(6, SIZE)
    prompts = [[10 * i + j for j in range(9)] for i in range(2)]  # two full blocks each, and a third begun
    for prompt in (prompts[0], prompts[1]):
        manager.free(serve(manager, prompt))
    manager.free(serve(manager, prompts[0]))  # used again: now 1 is the oldest
    taken = manager.pool.allocate(2)  # what never held a full block, and 1's tail
    assert [num_hit(manager, prompt) for prompt in prompts[:2]] == [8, 8 - SIZE * manager.pool.num_evictions]
    taken += manager.pool.allocate(2)
    assert [num_hit(manager, prompt) for prompt in prompts[:2]] == [8, 0]
    manager.pool.release(taken)


def snapshot(manager: KVCacheManager, request: Request) -> tuple:
    pool = manager.pool
    return (
        [(block.ref_count, block.content_hash) for block in pool.blocks],
        [block.block_id for block in pool.free_queue],
        {content_hash: block.block_id for content_hash, block in pool.cached.items()},
        (pool.num_evictions, list(pool.events)),
        (list(request.block_ids), list(request.token_ids)),
        (request.num_computed_tokens, request.num_registered_blocks),
    )


@pytest.mark.parametrize("hit_blocks", [0, 2])
def test_too_few_blocks_leave_everything_as_it_was(hit_blocks: int) -> None:
    manager = KVCacheManager(6, SIZE)
    manager.pool.events = []
    manager.free(serve(manager, list(range(9))))
    held = serve(manager, [50, 51, 52, 53])
    assert held.block_ids and manager.pool.num_free == 5
    request = make_request([*range(8), *range(100, 113)] if hit_blocks else list(range(200, 221)))  # 6 blocks
    hit = manager.get_computed_blocks(request)
    assert len(hit) == hit_blocks
    before = snapshot(manager, request)
    assert manager.allocate_slots(request, 21 - SIZE * hit_blocks, hit) is None
    assert snapshot(manager, request) == before
    manager.check_invariants([held, request])


def test_a_hit_is_not_evicted_by_its_own_allocation() -> None:
    """The two blocks found lie among the free ones, and are the next to be evicted."""
    manager = KVCacheManager(4, SIZE)
    manager.free(serve(manager, list(range(8))))
    rest = manager.pool.allocate(2)
    manager.pool.release(rest)  # now the two that hold something are the oldest
    request = make_request([*range(8), *range(50, 57)])
    hit = manager.get_computed_blocks(request)
    assert [block.block_id for block in manager.pool.free_queue][:2] == hit[::-1] and len(hit) == 2
    assert manager.allocate_slots(request, 7, hit) is not None
    assert request.block_ids[:2] == hit and len(set(request.block_ids)) == 4
    assert manager.pool.num_evictions == 0 and num_hit(manager, [*range(8), 0]) == 8
    manager.check_invariants([request])


# ---- what a cached block holds ----------------------------------------------------------------------


class Memory:
    """What the cache tensors would hold: of each slot, everything that its keys and values depend on."""

    def __init__(self, num_blocks: int) -> None:
        self.slots: list[list[int | None]] = [[None] * SIZE for _ in range(num_blocks)]
        self._names: dict[tuple, int] = {}  # (what came before, token) -> a number for "this token after that"

    def content(self, request: Request, stop: int) -> list[int]:
        """What slots of tokens 0 to `stop` must hold for `request`."""
        name, names = self._names.setdefault(("start", request.cache_keys), len(self._names)), []
        for token in request.token_ids[:stop]:
            name = self._names.setdefault((name, token), len(self._names))
            names.append(name)
        return names

    def compute(self, request: Request, count: int) -> None:
        """Write the next `count` tokens of `request`, as a step does."""
        first = request.num_computed_tokens
        for position, name in list(enumerate(self.content(request, first + count)))[first:]:
            self.slots[request.block_ids[position // SIZE]][position % SIZE] = name
        request.num_computed_tokens += count

    def read(self, block_ids: list[int]) -> list[int | None]:
        return [name for block_id in block_ids for name in self.slots[block_id]]


def check_mirror(mirror: KVMirror, request: Request) -> int:
    """What the events said of this request's blocks. Returns of how many they said something."""
    known = [i for i in range(request.num_registered_blocks) if request.block_hashes[i] in mirror.blocks]
    for i in known:
        parent = request.block_hashes[i - 1] if i else None
        tokens = tuple(request.token_ids[i * SIZE : (i + 1) * SIZE])
        assert mirror.blocks[request.block_hashes[i]] == (parent, tokens)
    return len(known)


def test_a_cached_block_always_holds_what_its_hash_says() -> None:
    """10,000 random operations on a small cache. After each, everything that is cached is read back, and a mirror
    fed by events alone knows the same hashes and tokens as the pool."""
    rng = random.Random(0)
    num_blocks = 24
    manager, memory, mirror = KVCacheManager(num_blocks, SIZE), Memory(num_blocks), KVMirror()
    pool = manager.pool
    pool.events = []
    users = [None, CacheKeys(salt="s"), CacheKeys(lora=("a", "/a")), CacheKeys(media=(MediaSpan("m", 2, 3),))]
    stems = [[rng.randrange(3) for _ in range(40)] for _ in range(3)]
    live: list[Request] = []
    expected: dict[bytes, list[int]] = {}  # of a hash, what its block must hold
    done: Counter[str] = Counter()
    told = 0

    def admit() -> None:
        stem = rng.choice(stems)
        tail = [rng.randrange(3) for _ in range(rng.randrange(6))]
        request = make_request(stem[: rng.randint(1, 40)] + tail, rng.choice(users))
        hit = manager.get_computed_blocks(request)
        assert memory.read(hit) == memory.content(request, len(hit) * SIZE), "a hit on foreign content"
        assert len(hit) * SIZE < request.num_tokens
        count = rng.randint(1, request.num_tokens - len(hit) * SIZE)
        before = snapshot(manager, request)
        if manager.allocate_slots(request, count, hit) is None:
            assert snapshot(manager, request) == before and not request.block_ids
            done["refused"] += 1
            return
        done["hits"] += len(hit)
        note(request)
        if rng.random() < 0.1:  # preempted while the step is being planned: nothing was computed
            manager.free(request)
            done["preempted"] += 1
            return
        memory.compute(request, count)
        live.append(request)

    def note(request: Request) -> None:
        for i in range(request.num_registered_blocks):
            content = memory.content(request, (i + 1) * SIZE)[-SIZE:]
            assert expected.setdefault(request.block_hashes[i], content) == content, "one hash for two contents"

    def grow() -> None:
        request = rng.choice(live)
        if request.num_computed_tokens == request.num_tokens:
            request.token_ids.append(rng.randrange(3))
        count = rng.randint(1, request.num_tokens - request.num_computed_tokens)
        if manager.allocate_slots(request, count) is None:
            finish(request)
        else:
            note(request)
            memory.compute(request, count)

    def finish(request: Request) -> None:
        live.remove(request)
        manager.free(request)

    for _ in range(10_000):
        dice = rng.random()
        if dice < 0.3 or not live:
            admit()
        elif dice < 0.9:
            grow()
        elif dice < 0.995:
            finish(rng.choice(live))
        else:
            done["resets"] += manager.reset_prefix_cache()
            if not live or rng.random() < 0.5:
                while live:
                    finish(live[0])
                assert manager.reset_prefix_cache()
                done["resets"] += 1
        mirror(pool.events)
        pool.events = []
        assert mirror.blocks.keys() == pool.cached.keys()
        for content_hash, block in pool.cached.items():
            assert memory.slots[block.block_id] == expected[content_hash]
        if live:
            told += check_mirror(mirror, rng.choice(live))
    manager.check_invariants(live)
    assert told > 10_000
    assert all(done[what] > 20 for what in ("hits", "refused", "preempted")) and done["resets"] > 3, done
    assert pool.num_evictions > 1000 and mirror.kinds[BlockRemoved] > pool.num_evictions
    assert mirror.kinds[AllBlocksCleared] == done["resets"] and mirror.kinds[BlockStored] > 1000


# ---- what is counted and reported ------------------------------------------------------------------


def test_the_recent_rate_follows_and_the_totals_stay() -> None:
    stats = PrefixCacheStats()
    assert stats.hit_rate == stats.recent_hit_rate == 0
    for _ in range(WINDOW):
        stats.record(10, 0)
    for i in range(1, WINDOW + 1):
        stats.record(30, 20)
        assert stats.recent_hit_rate == 20 * i / (30 * i + 10 * (WINDOW - i))
    assert stats.recent_hit_rate == 2 / 3
    assert (stats.requests, stats.hit_requests) == (2000, 1000)
    assert (stats.queried_tokens, stats.hit_tokens, stats.hit_rate) == (40_000, 20_000, 0.5)
    stats.forget_recent()
    assert (stats.recent_hit_rate, stats.hit_rate) == (0, 0.5)
    stats.record(4, 1)
    assert stats.recent_hit_rate == 0.25


def test_events_say_what_was_stored_and_after_what() -> None:
    manager = KVCacheManager(16, SIZE)
    serve(manager, list(range(9)))
    assert manager.pool.events is None, "nobody listens: nothing is recorded"
    manager = KVCacheManager(16, SIZE)
    manager.pool.events = []
    keys = CacheKeys("tenant", ("sql", "/sql"))
    first = serve(manager, list(range(9)), keys)
    second = serve(manager, [*range(8), *range(20, 29)], keys)
    lora, salt = ("lora", "sql", "/sql"), ("cache_salt", "tenant")
    assert manager.pool.events == [
        BlockStored(first.block_hashes, None, list(range(8)), SIZE, "sql", [(lora, salt), (lora,)]),
        BlockStored(second.block_hashes[2:], first.block_hashes[1], list(range(20, 28)), SIZE, "sql", [(lora,)] * 2),
    ]


def test_blocks_with_a_twin_are_not_reported_again() -> None:
    """A request that looks nothing up computes blocks 0 and 1 although they are cached; its third is new."""
    manager = KVCacheManager(16, SIZE)
    manager.pool.events = []
    first = serve(manager, list(range(9)))
    asks = Request("a", list(range(13)), SamplingParams(prompt_logprobs=1))
    manager.allocate_slots(asks, 13)
    [_, stored] = manager.pool.events
    assert stored == BlockStored(asks.block_hashes[2:], first.block_hashes[1], [8, 9, 10, 11], SIZE, None, [()])
