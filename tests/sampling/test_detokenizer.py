"""Incremental text equals the full decode, in whole characters, however the text is cut into tokens."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from course_lib.engine.detokenizer import IncrementalDetokenizer
from course_lib.engine.token_text import TokenizerText, WindowStream
from course_lib.sampling_params import SamplingParams

TEXTS = [
    "the quick brown fox jumps over the lazy dog.",
    "family: 👩‍👩‍👧‍👦, flag 🏳️‍🌈, skin 👍🏽, keycap 1️⃣!",
    "नमस्ते दुनिया — क्षत्रिय श्री",
    "你好，世界。日本語のテキスト 한국어",
    "مرحبا بالعالم، كيف الحال؟",
    "def add(a, b):\n\tif a  <  b:\r\n        return {'x': [a + b]}  # ±\n\n",
    " naïve café\u00a0façade e\u0301 \U00010348 𝒳 \x00 \x7f",
    "   spaces   at   both   ends   ",
]


def _splits(tokenizer: PreTrainedTokenizerFast, text: str, seed: int) -> list[int]:
    """Token ids of `text` cut at random places: seldom the tokenizer's own cut."""
    rng = random.Random(seed)
    backend = tokenizer.backend_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    result: list[int] = []
    for token_id in ids:
        piece = backend.id_to_token(token_id)
        parts = [piece]
        if len(piece) > 1 and not piece.startswith("<") and rng.random() < 0.6:
            cut = rng.randrange(1, len(piece))
            parts = [piece[:cut], piece[cut:]]
        part_ids = [backend.token_to_id(part) for part in parts]
        result.extend(part_ids if None not in part_ids else [token_id])
    return result


def _plain(tokenizer: PreTrainedTokenizerFast, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def _run(detokenizer: IncrementalDetokenizer, ids: list[int]) -> tuple[list[str], str | None]:
    """Feed the tokens one by one; the deltas, and the stop string if one was found."""
    deltas = []
    for token_id in ids:
        stop = detokenizer.update([token_id], stop_terminated=False)
        deltas.append(detokenizer.get_next_output_text(finished=stop is not None, delta=True))
        if stop is not None:
            return deltas, stop
    deltas.append(detokenizer.get_next_output_text(finished=True, delta=True))
    return deltas, None


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_equal_full_decode(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    for seed in range(20):
        ids = _splits(tokenizer, text, seed)
        wanted = _plain(tokenizer, prompt + ids)[len(_plain(tokenizer, prompt)):]
        detokenizer = IncrementalDetokenizer.from_request(tokenizer, prompt, SamplingParams())
        deltas, _ = _run(detokenizer, ids)
        assert "".join(deltas) == wanted == detokenizer.output_text
        assert not any("\ufffd" in delta for delta in deltas)
        assert detokenizer.token_ids == ids


def test_characters_come_whole_and_at_once(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each delta ends where a character of the text ends, and comes with the character's last byte."""
    text = "a👍é"
    ids = [byte_level_tokenizer.backend_tokenizer.token_to_id(char) for char in "aðŁĳįÃ©"]
    assert _plain(byte_level_tokenizer, ids) == text
    detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, [], SamplingParams())
    assert _run(detokenizer, ids)[0] == ["a", "", "", "", "👍", "", "é", ""]


def test_half_a_character_at_the_end_is_flushed(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    ids = tokenizer.encode(" ok 🏳", add_special_tokens=False)[:-1]
    wanted = _plain(tokenizer, prompt + ids)[len(_plain(tokenizer, prompt)):]
    assert wanted.endswith("\ufffd")
    detokenizer = IncrementalDetokenizer.from_request(tokenizer, prompt, SamplingParams())
    deltas, _ = _run(detokenizer, ids)
    assert "".join(deltas) == wanted
    assert not any("\ufffd" in delta for delta in deltas[:-1])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_of_a_byte_level_tokenizer(byte_level_tokenizer: PreTrainedTokenizerFast,
                                           data: st.DataObject, skip: bool) -> None:
    """Also broken UTF-8, special tokens and ids outside the vocabulary."""
    size = len(byte_level_tokenizer)
    ids = data.draw(st.lists(st.integers(0, size + 3), max_size=30))
    detokenizer = IncrementalDetokenizer.from_request(
        byte_level_tokenizer, [], SamplingParams(skip_special_tokens=skip))
    deltas, _ = _run(detokenizer, ids)
    assert "".join(deltas) == byte_level_tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)


def test_both_streams_agree(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    """The general stream gives a byte-level tokenizer's text too (it serves slow tokenizers)."""
    shared = TokenizerText.of(byte_level_tokenizer)
    for text in TEXTS:
        ids = byte_level_tokenizer.encode(text)
        stream = WindowStream(shared, [], skip_special=True, spaces=True)
        assert "".join([stream.step(i) for i in ids]) + stream.flush() == text


def test_broken_bytes_do_not_pile_up(sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = WindowStream(TokenizerText.of(sentencepiece_tokenizer), [], skip_special=True, spaces=True)
    lead = sentencepiece_tokenizer.convert_tokens_to_ids("<0xE2>")
    text = "".join(stream.step(lead) for _ in range(500))
    assert len(stream._window) < 50 and set(text) == {"\ufffd"}


def test_first_token_keeps_its_space(sentencepiece_tokenizer: PreTrainedTokenizerFast) -> None:
    """decode(output) alone would lose it; after a prompt without text, it is lost in a full decode too."""
    output = sentencepiece_tokenizer.encode("the dog", add_special_tokens=False)
    assert _plain(sentencepiece_tokenizer, output) == "the dog"
    bos = sentencepiece_tokenizer.bos_token_id
    for prompt, wanted in (("hello", " the dog"), (None, "the dog")):
        ids = [bos] if prompt is None else [bos, *sentencepiece_tokenizer.encode(prompt)]
        detokenizer = IncrementalDetokenizer.from_request(sentencepiece_tokenizer, ids, SamplingParams())
        assert "".join(_run(detokenizer, output)[0]) == wanted


def test_prompt_ending_inside_a_character(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_level_tokenizer.encode("ok 👍 yes")
    lead = byte_level_tokenizer.backend_tokenizer.token_to_id("ð")
    cut = ids.index(lead) + 1
    detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, ids[:cut], SamplingParams())
    assert "".join(_run(detokenizer, ids[cut:])[0]) == "👍 yes"
    space = byte_level_tokenizer.encode(" yes")
    detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, ids[:cut], SamplingParams())
    assert "".join(_run(detokenizer, space)[0]) == " yes"  # the broken half belongs to the prompt


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(tokenizer: PreTrainedTokenizerFast, skip: bool) -> None:
    ids = tokenizer.encode("hello<|user|> the<tool call></s> dog", add_special_tokens=False)
    prompt = tokenizer.encode("stop", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer.from_request(
        tokenizer, prompt, SamplingParams(skip_special_tokens=skip))
    text = "".join(_run(detokenizer, ids)[0])
    assert text == _plain(tokenizer, prompt + ids, skip)[len(_plain(tokenizer, prompt)):]
    assert ("<|user|>" in text) == (not skip) and "<tool call>" in text


STOP_CASES = [
    # text, stop strings, text before the stop, the stop string
    ("the quick brown fox", ["brown"], "the quick ", "brown"),
    ("the quick brown fox", ["k b"], "the quic", "k b"),
    ("one 👍 two", ["👍"], "one ", "👍"),
    ("stop here, and do not stop there", ["there", "here"], "stop ", "here"),  # not the list's order
    ("abcdef", ["bcde", "cd"], "ab", "cd"),  # completed first
    ("abcdef", ["cd", "bcd"], "a", "bcd"),  # completed together: the longest
    ("stop it", ["to", "stop"], "s", "to"),  # both inside one token
    ("aaab", ["aab"], "a", "aab"),
    ("def f():\n\n\nx", ["\n\n"], "def f():", "\n\n"),
    ("nothing to see", ["zzz"], "nothing to see", None),
]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("text", "stops", "before", "stop"), STOP_CASES)
def test_stop_strings(tokenizer: PreTrainedTokenizerFast, text: str, stops: list[str], before: str,
                      stop: str | None, include: bool) -> None:
    """The same cut for every split into tokens, and no delta ever shows what is later cut off."""
    prompt = tokenizer.encode("hello\n", add_special_tokens=False)
    lead = _plain(tokenizer, prompt + tokenizer.encode(text, add_special_tokens=False))
    lead = lead[len(_plain(tokenizer, prompt)):].removesuffix(text)  # SentencePiece's space
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    for seed in range(12):
        ids = _splits(tokenizer, text, seed)
        detokenizer = IncrementalDetokenizer.from_request(tokenizer, prompt, params)
        deltas, found = _run(detokenizer, ids)
        assert found == stop
        assert "".join(deltas) == lead + before + (stop if include and stop else "")
        # Several tokens in one update (speculative decoding): the same, and none after the stop.
        at_once = IncrementalDetokenizer.from_request(tokenizer, prompt, params)
        assert at_once.update(ids, stop_terminated=False) == stop
        assert at_once.get_next_output_text(finished=True, delta=False) == "".join(deltas)
        assert at_once.token_ids == detokenizer.token_ids == ids[: len(detokenizer.token_ids)]


def test_hold_back(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    """Until finished the last max(len(stop)) - 1 characters stay back; with the stop string included,
    nothing needs to."""
    ids = [byte_level_tokenizer.backend_tokenizer.token_to_id(char) for char in "abcdefg"]
    for include, shown in ((False, "abcd"), (True, "abcdefg")):
        params = SamplingParams(stop=["zzzz", "z"], include_stop_str_in_output=include)
        detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, [], params)
        for token_id in ids:
            detokenizer.update([token_id], stop_terminated=False)
        assert detokenizer.get_next_output_text(finished=False, delta=False) == shown
        assert detokenizer.get_next_output_text(finished=False, delta=True) == shown
        assert detokenizer.get_next_output_text(finished=False, delta=True) == ""
        assert detokenizer.get_next_output_text(finished=True, delta=True) == "abcdefg"[len(shown):]
        assert detokenizer.get_next_output_text(finished=True, delta=False) == "abcdefg"


def test_min_tokens_protects_from_stop_strings(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [byte_level_tokenizer.backend_tokenizer.token_to_id(char) for char in "axbxcx"]
    for min_tokens, text in ((0, "a"), (1, "a"), (2, "axb"), (3, "axb"), (4, "axbxc"), (6, "axbxcx")):
        params = SamplingParams(stop="x", min_tokens=min_tokens)
        detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, [], params)
        assert "".join(_run(detokenizer, ids)[0]) == text


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_text(byte_level_tokenizer: PreTrainedTokenizerFast, include: bool) -> None:
    """A stop token stays in token_ids; its text is shown only with include_stop_str_in_output."""
    ids = [byte_level_tokenizer.backend_tokenizer.token_to_id(char) for char in "abc"]
    params = SamplingParams(stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    detokenizer = IncrementalDetokenizer.from_request(byte_level_tokenizer, [], params)
    assert detokenizer.update(ids, stop_terminated=True) is None
    assert detokenizer.get_next_output_text(finished=True, delta=False) == ("abc" if include else "ab")
    assert detokenizer.token_ids == ids


def test_without_detokenizing(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    silent = SamplingParams(detokenize=False)
    for tokenizer, params in ((None, SamplingParams()), (byte_level_tokenizer, silent)):
        detokenizer = IncrementalDetokenizer.from_request(tokenizer, [1], params)
        assert detokenizer.update([5, 6], stop_terminated=False) is None
        assert detokenizer.get_next_output_text(finished=True, delta=False) == ""
        assert detokenizer.token_ids == [5, 6]


def test_tokenizer_can_still_be_copied(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    """What is remembered on the tokenizer neither breaks nor follows its copies wrongly."""
    TokenizerText.of(byte_level_tokenizer)
    for twin in (copy.deepcopy(byte_level_tokenizer), pickle.loads(pickle.dumps(byte_level_tokenizer))):
        assert TokenizerText.of(twin).tokenizer is twin
        assert "".join(_run(IncrementalDetokenizer.from_request(twin, [], SamplingParams()),
                            twin.encode("hello"))[0]) == "hello"


def test_slow_tokenizer() -> None:
    """A tokenizer in plain Python (ByT5: one token per byte, files not needed)."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt = tokenizer.encode("hello")
        detokenizer = IncrementalDetokenizer.from_request(tokenizer, prompt, SamplingParams())
        deltas, _ = _run(detokenizer, ids)
        assert "".join(deltas) == text and not any("\ufffd" in delta for delta in deltas)
