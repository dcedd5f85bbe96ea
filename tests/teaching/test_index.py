"""The generated pages: complete, linked, in order, and written only when something changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from course_lib.errors import CourseError
from course_lib.teaching import catalogue
from course_lib.teaching.catalogue import STAGES, lesson, lessons
from course_lib.teaching.lessons import index

README = f"# The course\n\n{index.BEGIN}\nold\n{index.END}\n\n## More\n"
SOURCE = """\
# ---
# jupyter:
#   course:
#     lesson: "{number}"
#     objectives: ["see"]
#     difficulty: 1
#     needs: []
#     opens: []
#     terms: {terms}
#   kernelspec: {{display_name: Python 3 (ipykernel), language: python, name: python3}}
# ---

# %% [markdown]
# Text.
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """An empty repository with a README; call it to write a lesson there."""
    monkeypatch.setattr(catalogue, "REPO_ROOT", tmp_path)
    monkeypatch.setattr(index, "REPO_ROOT", tmp_path)
    (tmp_path / "README.md").write_text(README)

    def write(number: str, **terms: str) -> None:
        source = lesson(number).source
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text(SOURCE.format(number=number, terms=terms))

    return write


def test_the_table_has_every_lesson_under_its_stage(write: Callable[..., None]) -> None:
    write("02")
    table = index.lesson_table(lessons())
    assert table.splitlines()[0] == index.BEGIN and table.splitlines()[-1] == index.END
    rows = re.findall(r"^(?:### (.+)|\| (\d\d) \| (.+) \| (\d+) \| (.+) \|)$", table, flags=re.MULTILINE)
    assert [stage for stage, *_ in rows if stage] == list(STAGES.values())
    assert [number for _, number, *_ in rows if number] == [each.number for each in lessons()]
    stage = None
    for heading, number, shown, minutes, builds in rows:
        if heading:
            stage = heading
            continue
        each = lesson(number)
        assert (stage, int(minutes), builds) == (STAGES[each.stage], each.minutes, each.builds)
        link = "[LLM engine example](notebooks/stage1_core/02_llm_engine_example.ipynb)"
        assert shown == (link if number == "02" else f"{each.title} (coming)")


def test_only_what_stands_between_the_markers_changes() -> None:
    page = index.with_lesson_table(README, lessons())
    assert page == README.replace(f"{index.BEGIN}\nold\n{index.END}", index.lesson_table(lessons()))
    assert index.with_lesson_table(page, lessons()) == page


@pytest.mark.parametrize(
    "readme",
    [
        "# No markers\n",
        f"{index.BEGIN}\n",
        f"{index.END}\n{index.BEGIN}\n",
        README + index.BEGIN,
        README + index.END,
    ],
)
def test_a_readme_without_clear_markers_is_refused(readme: str) -> None:
    with pytest.raises(CourseError, match="each once"):
        index.with_lesson_table(readme, lessons())


def test_notebooks_readme_names_examples_and_files(write: Callable[..., None]) -> None:
    write("01")
    page = index.notebooks_readme(lessons())
    assert page.count("**01 [Basic](stage1_core/01_basic.ipynb)**") == 1
    assert page.count("(coming)**") == 42
    for each in lessons():
        for written in filter(None, (each.vllm_example, each.vllm_example_now, *each.vllm_files)):
            path, _, where = written.partition(" ")
            assert f"`{path}`" in page and where in page
        assert each.moved in page and each.note in page


VLLM = "https://github.com/vllm-project/vllm/blob"


@pytest.mark.parametrize(
    ("written", "release", "shown"),
    [
        ("vllm/a.py", "0.32", f"[`vllm/a.py`]({VLLM}/v0.32.0/vllm/a.py)"),
        ("vllm/a.py (0.8.5)", "0.32", f"[`vllm/a.py`]({VLLM}/v0.8.5/vllm/a.py) (0.8.5)"),
        ("b/a.py", "0.8.5", f"[`b/a.py`]({VLLM}/v0.8.5/b/a.py)"),
        ("c.py (vllm-neuron)", "0.32", "`c.py` (vllm-neuron)"),
    ],
)
def test_a_path_links_to_its_release(written: str, release: str, shown: str) -> None:
    assert index._reference(written, release) == shown


def test_the_glossary_is_alphabetical_and_says_where_each_term_comes_from() -> None:
    terms = [(lesson(2), {"slot": "A place.", "block table": "A list"}), (lesson(1), {"KV cache": "It"})]
    page = index.glossary(terms)
    two = "[02 LLM engine example](stage1_core/02_llm_engine_example.ipynb)"
    assert page.splitlines()[-3:] == [
        f"- **block table**: A list. ({two})",
        "- **KV cache**: It. ([01 Basic](stage1_core/01_basic.ipynb))",
        f"- **slot**: A place. ({two})",
    ]


def test_a_term_defined_twice_is_refused() -> None:
    with pytest.raises(CourseError, match="'Slot' is defined twice, in lessons 01 and 02"):
        index.glossary([(lesson(1), {"slot": "A place"}), (lesson(2), {"Slot": "Another"})])


def test_pages_are_written_when_they_change_and_only_then(write: Callable[..., None], tmp_path: Path) -> None:
    readme, notebooks = tmp_path / "README.md", tmp_path / "notebooks"
    guide, glossary = notebooks / "README.md", notebooks / "GLOSSARY.md"
    assert index.stale_indexes() == [readme, guide, glossary] and not notebooks.exists()
    assert index.write_indexes() == [readme, guide, glossary]
    assert index.stale_indexes() == [] == index.write_indexes()

    write("01", token="A piece of text")
    assert index.stale_indexes() == [readme, guide, glossary]
    index.write_indexes()
    assert "**token**" in glossary.read_text() and "[Basic](notebooks/" in readme.read_text()
    assert readme.read_text().startswith("# The course\n") and readme.read_text().endswith("## More\n")

    guide.write_text("edited by hand")
    assert index.stale_indexes() == [guide] == index.write_indexes()


def test_nothing_is_written_when_one_page_cannot_be_made(write: Callable[..., None], tmp_path: Path) -> None:
    write("01", token="A piece of text")
    write("02", Token="The same")
    with pytest.raises(CourseError, match="defined twice"):
        index.write_indexes()
    assert (tmp_path / "README.md").read_text() == README and not (tmp_path / "notebooks").exists()


def test_the_pages_of_the_course_are_up_to_date() -> None:
    assert index.stale_indexes() == [], "python3 -m course_lib build"
