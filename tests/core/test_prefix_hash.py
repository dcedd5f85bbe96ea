"""Block hashes: chains, extra keys, and what a hash that is too short would do."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.core import prefix_hash
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.prefix_hash import ROOT, CacheKeys, MediaSpan, extend_block_hashes, hash_block
from course_lib.core.request import Request
from course_lib.sampling_params import SamplingParams

SIZE = 4


def make_request(tokens: list[int], keys: CacheKeys | None = None) -> Request:
    return Request("r", tokens, SamplingParams(max_tokens=8), cache_keys=keys)


def hashes(tokens: list[int], keys: CacheKeys | None = None) -> list[bytes]:
    request = make_request(tokens, keys)
    extend_block_hashes(request, SIZE)
    return request.block_hashes


def test_a_changed_token_changes_its_block_and_all_later_ones() -> None:
    tokens = list(range(16))
    before = hashes(tokens)
    assert len(before) == 4 == len(set(before))
    assert hashes([*tokens, 99]) == before, "a block that is not full has no name"
    for position in range(16):
        changed = hashes(tokens[:position] + [77] + tokens[position + 1 :])
        first = position // SIZE
        assert changed[:first] == before[:first]
        assert not set(changed[first:]) & set(before)


def test_hashes_do_not_depend_on_when_they_are_made() -> None:
    keys = CacheKeys("s", ("a", "/a"), (MediaSpan("cat", 2, 7), MediaSpan("dog", 9, 1)))
    request = make_request([1], keys)
    for token in range(2, 31):
        request.token_ids.append(token)
        extend_block_hashes(request, SIZE)
    assert request.block_hashes == hashes(list(range(1, 31)), keys)


def test_which_blocks_carry_which_keys() -> None:
    """vLLM's: the salt in the first block, the adapter in all, an image where it lies, counted from the block."""
    keys = CacheKeys("tenant", ("sql", "/adapters/sql"), (MediaSpan("cat", 2, 7), MediaSpan("dog", 10, 1)))
    lora = ("lora", "sql", "/adapters/sql")
    assert [keys.of_block(begin, begin + 4) for begin in (0, 4, 8, 12)] == [
        (lora, ("mm", "cat", 2), ("cache_salt", "tenant")),
        (lora, ("mm", "cat", -2)),
        (lora, ("mm", "cat", -6), ("mm", "dog", 2)),
        (lora,),
    ]
    assert CacheKeys().of_block(0, 4) == ()
    assert hashes(list(range(8)), CacheKeys()) == hashes(list(range(8)))


TEXT = st.text('a"[], \\\x00é\ud800', max_size=3)  # what would confuse a careless concatenation
SPANS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), TEXT), max_size=4)


def place(spans: list[tuple[int, int, str]]) -> tuple[MediaSpan, ...]:
    media, position = [], 0
    for gap, length, identifier in spans:
        media.append(MediaSpan(identifier, position + gap, length))
        position = media[-1].end
    return tuple(media)


KEYS = st.builds(CacheKeys, salt=st.none() | TEXT, lora=st.none() | st.tuples(TEXT, TEXT), media=SPANS.map(place))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(KEYS, KEYS, st.integers(0, 5))
def test_only_equal_keys_give_equal_hashes(one: CacheKeys, other: CacheKeys, block: int) -> None:
    begin, end = block * SIZE, (block + 1) * SIZE
    for keys in (one, other):
        overlapping = [("mm", s.identifier, s.offset - begin) for s in keys.media if s.offset < end and s.end > begin]
        assert [key for key in keys.of_block(begin, end) if key[0] == "mm"] == overlapping
    parent, tokens = bytes(32), [1, 2, 3, 4]
    same = one.of_block(begin, end) == other.of_block(begin, end)
    made = [hash_block(parent, tokens, keys.of_block(begin, end)) for keys in (one, other)]
    assert (made[0] == made[1]) == same


@pytest.mark.parametrize(
    "one, other",
    [
        (CacheKeys(salt="ab"), CacheKeys(salt="a")),
        (CacheKeys(salt="x"), CacheKeys(lora=("x", ""))),
        (CacheKeys(lora=("ab", "c")), CacheKeys(lora=("a", "bc"))),
        (CacheKeys(lora=("name", "/old")), CacheKeys(lora=("name", "/new"))),
        (CacheKeys(media=(MediaSpan("1", 2, 1),)), CacheKeys(media=(MediaSpan("12", 2, 1),))),
        (CacheKeys(media=(MediaSpan("m", 2, 1),)), CacheKeys(media=(MediaSpan("m", 1, 1),))),
    ],
)
def test_what_must_not_be_confused(one: CacheKeys, other: CacheKeys) -> None:
    tokens = [5] * 12
    assert not {*hashes(tokens, one)} & {*hashes(tokens, other)}
    assert not {*hashes(tokens, one)} & {*hashes(tokens)}


@pytest.mark.parametrize(
    "spans, said",
    [
        ([MediaSpan("a", 0, 3), MediaSpan("b", 2, 3)], "begins before .* has ended"),
        ([MediaSpan("a", 4, 1), MediaSpan("b", 1, 1)], "begins before .* has ended"),
        ([MediaSpan("a", -1, 3)], "begin at 0 or later"),
        ([MediaSpan("a", 1, 0)], "at least one token"),
    ],
)
def test_media_out_of_order_are_refused(spans: list[MediaSpan], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CacheKeys(media=tuple(spans))


class ShortHash:
    """The first 16 bits of SHA-256."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def digest(self) -> bytes:
        return sha256(self._content).digest()[:2]


def test_a_short_hash_shares_wrongly_and_sha256_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 bits an attacker finds another prompt of the victim's hash in a second, and reads its keys and
    values. The same two prompts under SHA-256 have nothing in common."""
    victim = [1, 2, 3, 4, 5]

    def attack_hits(attack: list[int]) -> bool:
        manager = KVCacheManager(8, SIZE)
        first = make_request(victim)
        manager.allocate_slots(first, len(victim))
        first.num_computed_tokens = len(victim)
        return manager.get_computed_blocks(make_request(attack)) == first.block_ids[:1]

    with monkeypatch.context() as short:
        short.setattr(prefix_hash, "sha256", ShortHash)
        [target] = hashes(victim)
        guesses = ([6, 7, i, j] for i in range(1000) for j in range(1000))
        attack = [*next(guess for guess in guesses if hash_block(ROOT, guess) == target), 5]
        assert attack_hits(attack), "16 bits: tokens 1 2 3 4 are taken for other ones"
    assert attack_hits(victim)
    assert not attack_hits(attack)
