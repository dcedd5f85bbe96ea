"""Replays through the prefix cache, and the pictures of them."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from course_lib.core.block_pool import BlockPool
from course_lib.core.prefix_hash import ROOT, hash_block
from course_lib.teaching import explore_hits
from course_lib.teaching.explorers.figures import MAX_BYTES, png_bytes
from course_lib.teaching.explorers.hit_rate import describe_hits, draw_hit_rates, draw_hits, draw_queues
from course_lib.teaching.recording.replay import find_forgery, replay, sweep, watch_queue

PAGES = [list(range(100 * page, 100 * page + 12)) for page in range(1, 4)]  # three blocks of four
PROMPTS = [page + [ending] for ending in (7, 8) for page in PAGES]  # in turn, two rounds
LETTERS = {"A": ["aa", "bb", "cc"], "B": ["aa", "dd"], "C": ["ee", "ff", "gg"], "D": ["aa", "dd", "hh"]}


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_everything_is_found_where_it_fits_and_nothing_in_turn_where_it_does_not() -> None:
    roomy, tight = replay(PROMPTS, 13, block_size=4), replay(PROMPTS, 8, block_size=4)
    assert roomy.found_tokens == (0, 0, 0, 12, 12, 12)
    assert tight.found_tokens == (0,) * 6
    assert roomy.hit_rate == 36 / 78 and roomy.computed_tokens == 42
    assert tight.num_evictions > roomy.num_evictions


def test_salts_keep_requests_apart() -> None:
    assert replay(PROMPTS, 40, block_size=4, salts=["a"] * 3 + ["b"] * 3).found_tokens == (0,) * 6
    assert replay(PROMPTS, 40, block_size=4, salts=["a", "b", "c"] * 2).found_tokens == (0, 0, 0, 12, 12, 12)


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=3: request 0 has 13 tokens"):
        replay(PROMPTS, 3, block_size=4)


def test_a_sweep_has_every_combination() -> None:
    long = [page + list(range(40)) for page in PAGES]
    swept = sweep({"pages": [(prompt, i) for i, prompt in enumerate(long + long)]}, [6, 12])
    assert [*swept] == [
        ("pages", order, salts)
        for order in ("as they come", "put together")
        for salts in ("no salts", "two companies", "a salt each")
    ]
    assert [one.num_blocks for one in swept["pages", "put together", "no salts"]] == [6, 12]
    assert swept["pages", "as they come", "no salts"][0].hit_rate == 0
    assert swept["pages", "put together", "no salts"][0].hit_rate > 0.4
    assert swept["pages", "put together", "a salt each"][1].hit_rate == 0


def test_the_queue_keeps_beginnings_unless_freed_from_the_front() -> None:
    moments = watch_queue(LETTERS, 4, letters)
    assert [one.event for one in moments][:4] == ["A runs, 0 found", "A has ended", "B runs, 1 found", "B has ended"]
    assert moments[1].queue == ((3, ""), (2, "cc"), (1, "bb"), (0, "aa"))
    assert moments[3].queue == ((2, "cc"), (1, "bb"), (3, "dd"), (0, "aa"))
    assert moments[6].event == "D runs, 1 found"
    release = BlockPool.release
    with patch.object(BlockPool, "release", lambda pool, ids: release(pool, reversed(list(ids)))):
        assert watch_queue(LETTERS, 4, letters)[6].event == "D runs, 0 found"


def test_a_forgery_has_the_name_and_other_tokens() -> None:
    def short(parent: bytes, tokens: list[int]) -> bytes:
        return hash_block(parent, tokens)[:1]

    forged, tries = find_forgery([5, 6, 7, 8], short)
    assert len(forged) == 4 and forged != [5, 6, 7, 8] and short(ROOT, forged) == short(ROOT, [5, 6, 7, 8])
    assert 0 < tries < 5000


def test_pictures_are_small_and_pure() -> None:
    traffic = {"pages": [(page + list(range(40)), i) for i, page in enumerate(PAGES * 2)]}
    sweeps = sweep(traffic, range(6, 30, 2))
    chosen = ("pages", "as they come", "no salts")
    for draw in (
        lambda: draw_hits(sweeps, chosen, 8),
        lambda: draw_hit_rates({"one": sweeps[chosen], "other": sweeps[chosen]}),
        lambda: draw_queues({"one": watch_queue(LETTERS, 4, letters)}),
    ):
        picture = png_bytes(draw())
        assert len(picture) < MAX_BYTES and picture == png_bytes(draw())


def test_what_was_not_replayed_is_refused_in_words() -> None:
    sweeps = sweep({"pages": [(PAGES[0] + list(range(30)), 0)]}, [6, 8])
    with pytest.raises(ValueError, match="num_blocks=7: replayed were 6, 8"):
        describe_hits(sweeps, ("pages", "as they come", "no salts"), 7)


def test_the_explorer_is_one_output_with_a_picture_and_its_description(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, object]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    sweeps = sweep({"pages": [(PAGES[0] + list(range(30)), 0)]}, [6, 8])
    explore_hits(sweeps, ("requests", "order", "salts"), start=8)
    [bundle] = shown
    assert {"image/png", "text/plain", "application/vnd.jupyter.widget-view+json"} <= bundle.keys()
    assert bundle["text/plain"].startswith("pages, as they come, no salts, 8 blocks: 0 of 42 prompt tokens found")
