"""What a key depends on, and what a broken rule of sharing looks like, on a model of random weights."""

from __future__ import annotations

from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from matplotlib.figure import Figure

from course_lib import LLM
from course_lib.teaching.explorers import prefixes
from course_lib.teaching.explorers.figures import MAX_BYTES, png_bytes
from course_lib.teaching.recording.scheduling import limited
from course_lib.teaching.recording.trace import record

TEXT = [5, 9, 13, 17, 21, 25, 29, 33, 37, 41]


@pytest.fixture(scope="module")
def llm(tiny_model_path: Path) -> LLM:
    return LLM(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, max_num_seqs=8,
        max_num_batched_tokens=64, num_gpu_blocks_override=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def change(llm: LLM) -> torch.Tensor:
    """Token 5 of TEXT is replaced."""
    own, other = prefixes.keys_of(llm, [TEXT, [*TEXT[:5], 50, *TEXT[6:]]])
    return prefixes.difference(other, own)


def test_a_change_reaches_what_comes_after_it(change: torch.Tensor) -> None:
    differs = change > prefixes.SAME
    assert differs.shape[1] == len(TEXT)
    assert not differs[:, :5].any()
    assert differs[0].nonzero().flatten().tolist() == [5]  # layer 0 sees a token and its position
    assert differs[1:, 5:].all()


def test_keys_are_those_of_the_text_alone(llm: LLM) -> None:
    alone, longer = prefixes.keys_of(llm, [TEXT, [*TEXT, 3, 4, 6]])
    assert prefixes.difference(longer[:, : len(TEXT)], alone).max() < prefixes.SAME
    with pytest.raises(ValueError, match="64 tokens"):
        prefixes.keys_of(llm, [TEXT * 7])


def test_an_honest_engine_is_cleared(llm: LLM) -> None:
    evidence = prefixes.examine(llm, [(0, TEXT, 3), (1, TEXT, 5)], 1, nullcontext())
    assert evidence.wrong.max() < prefixes.SAME
    assert evidence.wrong.shape[1] == len(TEXT) + 3  # before its last step
    assert evidence.books == "the books are in order"
    assert len(evidence.texts) == 2


def test_a_block_by_its_own_tokens_has_a_wrong_past(llm: LLM) -> None:
    bug = patch("course_lib.core.prefix_hash.sha256", lambda content: sha256(content[32:]))
    other = [*TEXT[:2], 50, *TEXT[3:]]
    evidence = prefixes.examine(llm, [(0, TEXT, 2), (2, other, 2), (4, other, 2)], 2, bug)
    wrong = evidence.wrong > prefixes.SAME
    assert not wrong[0].any() and not wrong[:, :4].any()
    assert wrong[1:, 4:8].any()
    assert evidence.books == "the books are in order"


def test_broken_books_are_told(llm: LLM) -> None:
    def careless(pool, block_ids):
        for block_id in block_ids:
            pool.blocks[block_id].ref_count = 0
            pool.free_queue.append(pool.blocks[block_id])

    bug = patch("course_lib.core.block_pool.BlockPool.release", careless)
    evidence = prefixes.examine(llm, [(0, TEXT, 2), (0, TEXT, 6)], 1, bug)
    assert "reference count" in evidence.books


def test_figures_and_their_words(llm: LLM, change: torch.Tensor) -> None:
    words = [f"w{token}" for token in TEXT]
    with limited(llm), record(llm) as trace:
        llm.generate([TEXT], use_tqdm=False)
    figures = [
        prefixes.draw_change(words, change, 5, block_size=4),
        prefixes.draw_wrong_keys({"one": change, "two": change}, block_size=4),
        prefixes.draw_waits({"one": trace, "two": trace}),
        prefixes.draw_hits([0, 0.5], [2.0, 1.0], [2.0, 1.1]),
        prefixes.draw_triangle(words[:6], start=4, block_size=4),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        assert len(png_bytes(figure)) <= MAX_BYTES
    told = prefixes.describe_change(words, change, 5, block_size=4)
    assert "those of 5 tokens. Block 0 is the same; block 1 differs; block 2 differs." in told
    same = prefixes.describe_change(words, torch.zeros_like(change), 5, block_size=4)
    assert "block 2 is the same, not full" in same
