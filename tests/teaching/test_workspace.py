"""The learner's copies: made, brought to a new edition, recovered; no source of theirs is ever lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.teaching.learner import workspace
from course_lib.teaching.learner.merging import merge
from course_lib.teaching.learner.workspace import kernel_environment, make_welcome, update, work_folder
from course_lib.teaching.notebook_files import (
    DamagedNotebookError,
    course_metadata,
    digest,
    exercise_ids,
    read_notebook,
    write_notebook,
)
from tests.teaching.miniatures import SOURCES, make_lesson, notebook, own, write_edition

RAN = {"outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}], "execution_count": 7}


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    return make_lesson(tmp_path / "repository", monkeypatch)


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "work"


def opened(work, lesson):
    update(work, [lesson], {})
    return read_notebook(lesson.work_copy(work))


def saved(work, lesson, cells, **sources):
    """Save the learner's notebook with `cells`, of which some have other `sources`."""
    for cell in cells:
        cell["source"] = sources.get(cell["id"].replace("-", "_"), cell["source"])
    write_notebook(lesson.work_copy(work), {**read_notebook(lesson.work_copy(work)), "cells": cells})


def texts(work, lesson):
    return {cell["id"]: cell["source"] for cell in read_notebook(lesson.work_copy(work))["cells"]}


def test_work_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_WORK", raising=False)
    assert work_folder() == REPO_ROOT / "work"
    monkeypatch.setenv("COURSE_WORK", "mine")
    monkeypatch.chdir(tmp_path)
    assert work_folder() == tmp_path / "mine"
    environment = kernel_environment(work_folder())
    assert environment["COURSE_WORK"] == str(tmp_path / "mine")
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(REPO_ROOT)


def test_a_copy_is_made_once_without_outputs(work, lesson):
    edition = read_notebook(lesson.notebook)
    edition["cells"][1] |= RAN
    write_notebook(lesson.notebook, edition)
    assert update(work, [lesson], {}) == [f"Your copies of the lessons are made in {work}: 01."]
    copy = read_notebook(lesson.work_copy(work))
    assert copy["cells"][1]["outputs"] == [] and copy["cells"][1]["execution_count"] is None
    assert texts(work, lesson) == SOURCES and exercise_ids(copy) == ("01.1", "01.2")
    before = lesson.work_copy(work).stat().st_mtime_ns
    assert update(work, [lesson], {}) == []
    assert lesson.work_copy(work).stat().st_mtime_ns == before


def test_lessons_not_written_or_not_built_are_left_out(work, lesson):
    lesson.notebook.unlink()
    [said] = update(work, [lesson], {})
    assert "build 01" in said and not lesson.work_copy(work).exists()
    lesson.source.unlink()
    assert update(work, [lesson], {}) == []


def test_a_new_edition_keeps_the_learners_work(work, lesson):
    cells = opened(work, lesson)["cells"]
    cells.insert(4, own("print(square(2))", "mine-1"))
    saved(work, lesson, cells, ex_01_1="my answer", md_second="my note")
    old_file = lesson.work_copy(work).read_bytes()
    new = {key: text for key, text in SOURCES.items() if key != "md-second"}
    new |= {"header": "# New header", "ex-01-1": "new stub", "ex-01-2": "new stub", "md-new": "New."}
    write_edition(lesson, new, source_hash="2")
    [said] = update(work, [lesson], {})
    assert texts(work, lesson) == {
        **{key: SOURCES[key] for key in ("code-toys", "md-first", "check-01-1", "check-01-2", "md-recap")},
        **{"header": "# New header", "ex-01-2": "new stub", "md-new": "New."},
        **{"ex-01-1": "my answer", "mine-1": "print(square(2))", "md-second": "my note"},
    }
    assert list(texts(work, lesson))[4:8] == ["mine-1", "check-01-1", "md-second", "ex-01-2"]
    assert "cells new or changed: 3, kept as you edited them: 1, your own: 2" in said
    backup = work / ".backup" / "01_mini-1.ipynb"
    assert str(backup.relative_to(work.parent)) in said and backup.read_bytes() == old_file
    assert update(work, [lesson], {}) == []
    # edited is still edited, now against the new edition
    write_edition(lesson, {**new, "ex-01-1": "newest stub", "ex-01-2": "newest stub"}, source_hash="3")
    update(work, [lesson], {})
    assert texts(work, lesson)["ex-01-1"] == "my answer" and texts(work, lesson)["md-second"] == "my note"
    assert (work / ".backup" / "01_mini-2.ipynb").exists()


def test_an_edition_without_new_text_is_taken_silently(work, lesson):
    saved(work, lesson, opened(work, lesson)["cells"], ex_01_1="my answer")
    write_edition(lesson, SOURCES, source_hash="2")
    assert update(work, [lesson], {}) == [] and not (work / ".backup").exists()
    assert course_metadata(read_notebook(lesson.work_copy(work)))["source_hash"] == "2"


def test_a_deleted_cell_comes_back_and_a_dropped_one_goes(work, lesson):
    cells = [cell for cell in opened(work, lesson)["cells"] if cell["id"] != "check-01-1"]
    saved(work, lesson, cells)
    write_edition(lesson, {key: text for key, text in SOURCES.items() if key != "md-second"}, source_hash="2")
    update(work, [lesson], {})
    assert list(texts(work, lesson)) == [key for key in SOURCES if key != "md-second"]


def test_outputs_stay_where_the_source_does(work, lesson):
    cells = opened(work, lesson)["cells"]
    for cell in cells:
        cell |= RAN if cell["cell_type"] == "code" else {}
    saved(work, lesson, cells)
    write_edition(lesson, {**SOURCES, "code-toys": "new"}, source_hash="2")
    update(work, [lesson], {})
    cells = read_notebook(lesson.work_copy(work))["cells"]
    counts = {cell["id"]: cell.get("execution_count") for cell in cells}
    assert counts["ex-01-1"] == 7 and counts["code-toys"] is None


def test_an_exercise_turned_into_text_is_still_the_learners(work, lesson):
    cells = opened(work, lesson)["cells"]
    cells[3] = own("my plan", "md-plan") | {"id": "ex-01-1", "metadata": cells[3]["metadata"]}
    saved(work, lesson, cells)
    write_edition(lesson, SOURCES, source_hash="2")
    update(work, [lesson], {})
    cell = read_notebook(lesson.work_copy(work))["cells"][3]
    assert cell["source"] == "my plan" and cell["cell_type"] == "markdown" and "outputs" not in cell


_IDS = st.sampled_from([f"md-{letter}" for letter in "abcdefg"])


@given(
    old=st.lists(_IDS, unique=True), new=st.lists(_IDS, unique=True), edited=st.sets(_IDS),
    own_places=st.lists(st.integers(0, 7), max_size=4),
)  # fmt: skip
def test_no_merge_loses_a_source_or_the_new_order(old, new, edited, own_places):
    copy = notebook({name: f"old {name}" for name in old}, "1")
    for cell in copy["cells"]:
        cell["source"] += " edited" * (cell["id"] in edited)
    for number, place in enumerate(own_places):
        copy["cells"].insert(place, own(f"own {number}", f"own-{number}"))
    merged = merge(copy, notebook({name: f"new {name}" for name in new}, "2"))
    cells = merged.notebook["cells"]
    assert [cell["id"] for cell in cells if cell["id"] in new] == new
    assert len({cell["id"] for cell in cells}) == len(cells)
    expected = {f"own {number}" for number in range(len(own_places))}
    expected |= {f"old {name} edited" for name in old if name in edited}
    expected |= {f"new {name}" for name in new if name not in edited or name not in old}
    assert {cell["source"] for cell in cells} == expected
    mine = [cell["id"] for cell in copy["cells"] if cell["id"].startswith("own-")]
    if not set(old) - set(new):  # every predecessor survives: they keep their order as well, run by run
        for first, second in zip(copy["cells"], copy["cells"][1:], strict=False):
            if second["id"] in mine:
                order = [cell["id"] for cell in cells]
                assert order.index(second["id"]) == order.index(first["id"]) + 1


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"nbformat": 4}', '{"nbformat": 3, "worksheets": []}', "[]", '{"nbformat": 4, "cells": [1]}'],
)
def test_a_damaged_copy_is_set_aside_and_made_anew(work, lesson, text):
    opened(work, lesson)
    copy = lesson.work_copy(work)
    copy.write_text(text)
    [said] = update(work, [lesson], {"01.2": "my last checked answer", "02.1": "another lesson's"})
    assert "was damaged; restored from the lesson and your last checked answers to 01.2" in said
    assert texts(work, lesson) == {**SOURCES, "ex-01-2": "my last checked answer"}
    assert copy.with_name("01_mini.damaged-1.ipynb").read_text() == text
    copy.write_text("again")
    assert "01_mini.damaged-2.ipynb" in update(work, [lesson], {})[0]


def test_a_checkpoint_is_better_than_the_lesson(work, lesson):
    cells = opened(work, lesson)["cells"]
    saved(work, lesson, cells, ex_01_1="from the checkpoint")
    copy = lesson.work_copy(work)
    checkpoint = copy.parent / ".ipynb_checkpoints" / "01_mini-checkpoint.ipynb"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(copy.read_bytes())
    copy.write_bytes(copy.read_bytes()[:-20])
    write_edition(lesson, {**SOURCES, "md-new": "New."}, source_hash="2")  # damaged and out of date at once
    [said] = update(work, [lesson], {"01.1": "older", "01.2": "mine"})
    assert "JupyterLab's last checkpoint and your last checked answers to 01.2" in said
    assert texts(work, lesson) == {
        **SOURCES, "ex-01-1": "from the checkpoint", "ex-01-2": "mine", "md-new": "New."
    }  # fmt: skip


def test_one_copy_that_cannot_be_written_is_one_sentence(tmp_path, work, monkeypatch):
    first, second = (make_lesson(tmp_path / "repository", monkeypatch, number) for number in ("01", "02"))

    def write(path, notebook):
        if "01_mini" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_notebook(path, notebook)

    monkeypatch.setattr(workspace, "write_notebook", write)
    made, failed = update(work, [first, second], {})
    assert made.endswith("02.") and second.work_copy(work).exists()
    assert failed == (
        "work/stage1_core/01_mini.ipynb: not written (No space left on device)."
        " When that is mended, run this again."
    )


def test_a_full_disk_leaves_the_file_as_it_was(work, lesson, monkeypatch):
    opened(work, lesson)
    copy = lesson.work_copy(work)
    write_edition(lesson, {**SOURCES, "header": "# New"}, source_hash="2")
    before = copy.read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    [said] = update(work, [lesson], {})
    assert "No space left on device" in said and copy.read_bytes() == before
    assert [path.name for path in copy.parent.iterdir()] == ["01_mini.ipynb"]


def test_something_else_in_the_copys_place_is_told(work, lesson):
    lesson.work_copy(work).mkdir(parents=True)
    [said] = update(work, [lesson], {})
    assert "directory" in said


def test_notebooks_of_other_tools_are_read(tmp_path):
    code = {"cell_type": "code", "source": ["a\n", "b"], "outputs": []}
    cells = [code, {"cell_type": "markdown", "source": "c", "id": "x"}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 2, "cells": [*cells, cells[1]]}))
    read = read_notebook(path)
    assert [cell["source"] for cell in read["cells"]] == ["a\nb", "c", "c"]
    assert len({cell["id"] for cell in read["cells"]}) == 3 and read["nbformat_minor"] == 5
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedNotebookError, match="not a readable notebook"):
        read_notebook(path)


def test_a_base_is_what_the_builder_stores():
    assert digest("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"


def test_welcome_notebook_is_made_once_and_then_the_learners(work):
    path = make_welcome(work)
    cells = read_notebook(path)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert any("llm.chat(" in source for source in code) and cells[0]["cell_type"] == "markdown"
    for source in code:
        compile(source, "cell", "exec")
    path.write_text("mine")
    assert make_welcome(work).read_text() == "mine"
    assert [path.name for path in work.iterdir()] == ["welcome.ipynb"]
