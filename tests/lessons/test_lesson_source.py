"""The reading of a lesson's source: editions, ids, and the sentences about what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import jupytext
import pytest

from course_lib.teaching.lessons.lesson_source import LessonError, is_stub, read_lesson, solution_of, stub_of
from tests.lessons.miniature import FRONT_MATTER, Miniature, write_miniature


def lesson_of(tmp_path: Path, *cells: str, front_matter: str = FRONT_MATTER) -> Miniature:
    return write_miniature(tmp_path, source=front_matter + "".join(f"\n{cell}\n" for cell in cells))


def exercise_cell(body: str) -> str:
    check = '# %% tags=["check"]\ncheck("02.1")'
    return f'# %% tags=["exercise"]\n@exercise("02.1")\ndef f(x):\n{body}\n\n{check}'


def test_front_matter(miniature: Miniature) -> None:
    matter = read_lesson(miniature).front_matter
    assert (matter.lesson, matter.difficulty, matter.needs) == ("02", 2, ("01",))
    assert matter.objectives == ("Double", "Square", "Sort") and matter.opens == ("course_lib/errors.py",)
    assert matter.terms == {"double": "Twice as much."}


def test_a_solution_becomes_a_stub(miniature: Miniature) -> None:
    assert stub_of(miniature, "02.1").splitlines()[-1] == "    ...  # your code here"
    assert stub_of(miniature, "02.2").splitlines()[-2:] == ["    squared = None", "    return squared"]
    assert solution_of(miniature, "02.2").splitlines()[-1] == "    return x * x"
    assert "squared = None" not in solution_of(miniature, "02.2")
    assert not any("#:" in cell.learner + cell.solved for cell in read_lesson(miniature).cells)


TWO_REGIONS = """\
    #: solution
    y = x
    #: end
    for _ in x:
        #: solution
        y += 1

        y += 2
        #: stub
        break
        #: end
    return y"""


def test_several_regions_keep_their_places_and_indentation(tmp_path: Path) -> None:
    lesson = lesson_of(tmp_path, exercise_cell(TWO_REGIONS))
    stub = "    ...  # your code here\n    for _ in x:\n        break\n    return y"
    assert stub_of(lesson, "02.1").endswith("def f(x):\n" + stub)
    solved = "    y = x\n    for _ in x:\n        y += 1\n\n        y += 2\n    return y"
    assert solution_of(lesson, "02.1").endswith("def f(x):\n" + solved)
    hidden = ("    y = x", "        y += 1", "", "        y += 2")
    assert read_lesson(lesson).cells[0].solution_lines == hidden


def test_ids_follow_from_the_text(tmp_path: Path) -> None:
    cells = ("# %% [markdown]\n# text", "# %%\nx = 1", "# %%\nx = 1", exercise_cell("    x"))
    first = read_lesson(lesson_of(tmp_path / "a", *cells)).cells
    second = read_lesson(lesson_of(tmp_path / "b", "# %%\ny = 2", *cells[::-1])).cells
    assert [cell.id for cell in first][-2:] == ["ex-02-1", "check-02-1"]
    assert first[0].id.startswith("md-") and first[1].id.startswith("code-")
    assert first[2].id == f"{first[1].id}-2"
    assert {cell.id for cell in first} < {cell.id for cell in second}


def test_jupytext_reads_the_same(miniature: Miniature) -> None:
    theirs = jupytext.read(miniature.source, fmt="py:percent").cells
    ours = read_lesson(miniature).cells
    assert [cell.cell_type for cell in theirs] == [cell.kind for cell in ours]
    assert [cell.metadata.get("tags", []) for cell in theirs] == [list(cell.tags) for cell in ours]
    assert [cell.source for cell in theirs if "exercise" not in cell.metadata.get("tags", [])] == [
        cell.solved for cell in ours if "exercise" not in cell.tags
    ]


def test_await_may_stand_outside_functions(tmp_path: Path) -> None:
    read_lesson(lesson_of(tmp_path, "# %%\nasync for x in y:\n    await x"))


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["# %% Title\nx"], "line 13: a cell begins with"),
        (['# %% tags=["slow"]\nx'], "tags are of exercise, check, exact, not slow"),
        (["# %% [markdown]\n# fine\nnot fine"], "line 15: every line of a markdown cell"),
        (["# %%\nx = = 1"], "line 13: in the learner edition of this cell, line 1 is not Python"),
        (["# %%\n%matplotlib inline"], "is not Python"),
        (["# %%\n#: solution\nx\n#: end"], "solution regions stand in cells with tags"),
        ([exercise_cell("    #: end")], "line 16: the order of a region"),
        ([exercise_cell("    #: solution\n    #: solution\n    #: end")], "the order of a region"),
        ([exercise_cell("    #: solution\n    return 1")], "has no `#: end`"),
        ([exercise_cell("    #: soluton\n    return 1")], "`#:` begins a region"),
        ([exercise_cell("    #: solution\n    return 1\n    #: stub\n    #: end")], "in the learner edition"),
        (['# %% tags=["exercise"]\ndef f(): ...'], '`@exercise("NN.n")` once'),
        (['# %%\n@exercise("02.1")\ndef f(): ...'], '`@exercise("NN.n")` once'),
        (['# %% tags=["exercise"]\n@exercise("03.1")\ndef f(): ...'], 'are named "02.1"'),
        (['# %% tags=["exercise"]\n@exercise(name)\ndef f(): ...'], 'are named "02.1"'),
        (['# %% tags=["check"]\ncheck("02.1")\nx = 1'], "and nothing else"),
        (['# %% tags=["check"]\ncheck("02.1")'], "they must be the same"),
        ([exercise_cell("    x"), exercise_cell("    y")], "this is the second such cell of exercise 02.1"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, cells: list[str], said: str) -> None:
    with pytest.raises(LessonError, match=r"02_llm_engine_example\.py[,:]") as error:
        read_lesson(lesson_of(tmp_path, *cells))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("# ---\n# jup", "# jup", "begins with its front matter"),
        ('lesson: "02"', 'lesson: "03"', 'says lesson: "03", and this is "02"'),
        ("#     difficulty: 2\n", "", "difficulty"),
        ("difficulty: 2", "difficulty: easy", "a whole number"),
        ("needs: [", "wants: [", "wants"),
        ('needs: ["01"]', "needs: [1]", "text in quotes"),
        ('needs: ["01"]', 'needs: "01"', "are lists"),
        ("objectives: [", "objectives: [[", "ParserError"),
    ],
)
def test_front_matter_mistakes(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in FRONT_MATTER
    with pytest.raises(LessonError, match=r"line 1: ") as error:
        read_lesson(lesson_of(tmp_path, front_matter=FRONT_MATTER.replace(old, new, 1)))
    assert said in str(error.value)


def test_unknown_exercise_and_missing_source(miniature: Miniature) -> None:
    with pytest.raises(LessonError, match=r"no exercise 02\.9: it has 02\.1, 02\.2, 02\.3"):
        stub_of(miniature, "02.9")
    miniature.source.unlink()
    with pytest.raises(LessonError, match="no source that can be read"):
        solution_of(miniature, "02.1")


STUB = 'def f(x):\n    """Doc."""\n    ...  # your code here'


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (STUB, True),
        ("# mine\n\ndef f( x ):\n\n    'other doc'\n    ...", True),
        ("def f(x): ...", True),
        ('def f(x):\n    """Doc."""\n    pass', False),
        ("def f(x, y): ...", False),
        ("y = 1\n" + STUB, False),
        ("%time\n" + STUB, False),
        ("def f(x):", False),
    ],
)
def test_is_stub(cell: str, expected: bool) -> None:
    assert is_stub(cell, STUB) is expected
