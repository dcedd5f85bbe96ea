"""Lines of the course's messages fit a notebook's output, and lose nothing on the way."""

from __future__ import annotations

from io import StringIO

import pytest

from course_lib.teaching.learner.saying import WIDTH, say


def said(text: str) -> str:
    file = StringIO()
    say(text, file)
    return file.getvalue()


def test_lines_that_fit_stay_as_they_are() -> None:
    text = "01.1 · passed\n\n  table   with | columns\n" + "x" * WIDTH
    assert said(text) == text + "\n"


def test_a_long_line_is_broken_between_words_and_keeps_its_depth() -> None:
    text = "first\n  block_table = [" + ", ".join(map(str, range(60))) + "]\nlast"
    lines = said(text).splitlines()
    assert lines[0] == "first" and lines[-1] == "last" and len(lines) > 4
    assert all(len(line) <= WIDTH and line.startswith("  ") and line[2] != " " for line in lines[1:-1])
    assert "".join(said(text).split()) == "".join(text.split())


@pytest.mark.parametrize("word", ["y" * (WIDTH + 20), "state-of-" * 20])
def test_a_long_word_is_left_whole_to_be_copied(word: str) -> None:
    assert said(f"see {word} there") == f"see\n{word}\nthere\n"
