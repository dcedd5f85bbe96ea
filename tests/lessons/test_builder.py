"""The builder: what it writes, that it writes the same again, and that it stops cleanly."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.teaching import catalogue
from course_lib.teaching.building import builder
from course_lib.teaching.building.builder import EDITIONS, build, is_stale, notebook_path
from course_lib.teaching.lessons import index
from course_lib.teaching.lessons.lesson_source import LessonError
from tests.lessons.miniature import FRONT_MATTER, Miniature, write_miniature

COURSE = {lesson.number: lesson for lesson in catalogue.lessons()}


def stored(lesson: Miniature, edition: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(notebook_path(lesson, edition), as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_both_editions_are_written_and_executed(built_once: Miniature) -> None:
    learner, solved = (stored(built_once, edition) for edition in EDITIONS)
    assert [cell.id for cell in learner.cells] == [cell.id for cell in solved.cells]
    assert learner.cells[0].id == "header" and len({cell.id for cell in learner.cells}) == len(learner.cells)
    printed = {
        notebook.metadata.course.edition: [
            cell.outputs[0].text for cell in notebook.cells if cell.id.startswith("check-")
        ]
        for notebook in (learner, solved)
    }
    assert printed["learner"] == [f"02.{n} · not done yet\n" for n in (1, 2, 3)]
    assert printed["solved"] == [f"02.{n} · passed\n" for n in (1, 2, 3)]


def test_metadata(built_once: Miniature) -> None:
    learner, solved = (stored(built_once, edition) for edition in EDITIONS)
    assert set(learner.metadata) == {"course", "kernelspec", "language_info"}
    assert learner.metadata.course.lesson == "02" and solved.metadata.course.edition == "solved"
    assert learner.metadata.course.source_hash == solved.metadata.course.source_hash
    for mine, theirs in zip(learner.cells, solved.cells, strict=True):
        assert mine.metadata == theirs.metadata
        assert mine.metadata.course.base == builder.digest(mine.source)
        assert set(mine.metadata) <= {"course", "tags"}
    tags = {cell.id: cell.metadata.get("tags", []) for cell in learner.cells}
    assert tags["check-02-1"] == ["check", "nbval-check-output"] and tags["ex-02-1"] == ["exercise"]
    assert ["exact", "nbval-check-output"] in tags.values()


def test_header_comes_from_catalogue_and_front_matter(built_once: Miniature) -> None:
    text = stored(built_once, "learner").cells[0].source
    lesson = catalogue.lesson("02")
    for part in (lesson.title, f"{lesson.minutes} minutes", "★★☆☆", lesson.builds, "- Square"):
        assert part in text
    assert 'hint("02.1")' in text
    assert "[01 Basic](../stage1_core/01_basic.ipynb)" in text
    assert "[`course_lib/errors.py`](../../course_lib/errors.py)" in text
    assert f"`{lesson.vllm_files[0]}`" in text


def test_building_again_writes_the_same_bytes(built: Miniature) -> None:
    before = [notebook_path(built, edition).read_bytes() for edition in EDITIONS]
    build(built)
    assert [notebook_path(built, edition).read_bytes() for edition in EDITIONS] == before


@pytest.mark.parametrize("changed", ["source", "exercises"])
def test_stale_when_a_file_changes(miniature: Miniature, changed: str) -> None:
    assert is_stale(miniature)
    build(miniature, execute=False)
    assert not is_stale(miniature)
    path = getattr(miniature, changed)
    path.write_text(path.read_text() + "\n# more\n")
    assert is_stale(miniature)


def test_stale_when_a_notebook_is_missing_or_damaged(miniature: Miniature) -> None:
    build(miniature, execute=False)
    miniature.notebook.write_text('{"cells": [')
    assert is_stale(miniature)
    build(miniature, execute=False)
    miniature.solution_notebook.unlink()
    assert is_stale(miniature)


OUTPUTS = '''
# %%
import os
from pathlib import Path

import ipywidgets
from IPython.display import display

WIDGET = "application/vnd.jupyter.widget-view+json"
slider = ipywidgets.IntSlider()
display(slider)
display({WIDGET: {"model_id": slider.model_id, "version_major": 2}}, raw=True)
display({WIDGET: {}, "text/plain": "a picture"}, raw=True)
print(Path.cwd().samefile(Path(os.environ["COURSE_WORK"]).parent))
print(os.environ["COURSE_WORK"].startswith("/"), end="")
print("!")

# %%
import asyncio

print(await asyncio.sleep(0, "awaited"))
'''


def test_outputs_hold_nothing_of_the_live_kernel(tmp_path: Path) -> None:
    lesson = write_miniature(tmp_path, source=FRONT_MATTER + OUTPUTS)
    build(lesson)
    notebook = stored(lesson, "learner")
    first, second = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert "widget-view" not in str(first.outputs) and "widgets" not in notebook.metadata
    assert [output.output_type for output in first.outputs] == ["display_data", "display_data", "stream"]
    assert first.outputs[1].data == {"text/plain": "a picture"} and first.outputs[2].text == "True\nTrue!\n"
    assert second.outputs[0].text == "awaited\n" and second.execution_count == 2


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def f():\n    raise ValueError('on purpose')\n\nprint('before')\nf()", "ValueError: on purpose"),
        ("import os\nos._exit(3)", "died"),
    ],
)
def test_a_failing_cell_is_named_and_nothing_is_written(built: Miniature, code: str, said: str) -> None:
    before = built.notebook.read_bytes()
    built.source.write_text(built.source.read_text() + f"\n# %%\n{code}\n")
    with pytest.raises(LessonError, match=r"learner edition: cell \d+ \(code-\w+\) failed") as error:
        build(built)
    assert said in str(error.value) and "\x1b" not in str(error.value)
    assert built.notebook.read_bytes() == before


def test_the_kernel_is_this_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tmp_path / "data" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["false"], "display_name": "a namesake", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "data"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    lesson = write_miniature(tmp_path, source=FRONT_MATTER + "\n# %%\nimport sys\n\nprint(sys.executable)\n")
    build(lesson)
    assert stored(lesson, "learner").cells[1].outputs[0].text == f"{sys.executable}\n"


SLEEPER = """
# %%
import os, time
from pathlib import Path

Path({marker!r}).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_interrupt_stops_the_kernel(tmp_path: Path) -> None:
    marker = tmp_path / "kernel.pid"
    script = (
        "import sys; from pathlib import Path; from tests.lessons.miniature import *;"
        "from course_lib.teaching.building.builder import build;"
        f"build(write_miniature(Path({str(tmp_path)!r}), source=Path(sys.argv[1]).read_text()))"
    )
    source = write_miniature(tmp_path, source=FRONT_MATTER + SLEEPER.format(marker=str(marker))).source
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(source)],
        cwd=REPO_ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (marker.exists() and marker.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    kernel = int(marker.read_text())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in said and "never retrieved" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(kernel, 0)


def run(monkeypatch: pytest.MonkeyPatch, lesson: Miniature, *names: str, check: bool = False) -> int:
    """`build` in a course that has this one lesson."""
    course = {**COURSE, lesson.number: lesson}
    monkeypatch.setattr(catalogue, "lessons", lambda: (lesson,))
    monkeypatch.setattr(catalogue, "lesson", lambda number: course[f"{number:0>2}"])
    monkeypatch.setattr(index, "write_indexes", lambda: [])
    monkeypatch.setattr(index, "stale_indexes", lambda: [])
    parser = argparse.ArgumentParser()
    builder.add_build_arguments(parser)
    return builder.run_build(parser.parse_args([*names, *(["--check"] if check else [])]))


def test_command_builds_what_is_out_of_date(
    built: Miniature, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, built, check=True) == 0 and run(monkeypatch, built) == 0
    assert "edition" not in capsys.readouterr().out
    before = built.notebook.read_bytes()
    built.rewrite("x * x", "x**2")
    assert run(monkeypatch, built, check=True) == 1
    assert "02_llm_engine_example: out of date" in capsys.readouterr().out
    assert built.notebook.read_bytes() == before
    assert run(monkeypatch, built) == 0 and run(monkeypatch, built, check=True) == 0
    assert "02_llm_engine_example: built, " in capsys.readouterr().out


def test_command_goes_on_after_a_failure_and_fails(
    miniature: Miniature, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    miniature.rewrite("print(sorted([3, 1, 2]))", "print(sorted([3, 1, None]))")
    assert run(monkeypatch, miniature, "2") == 1
    said = capsys.readouterr().err
    assert "TypeError" in said and "1 of 1 lessons failed" in said and not miniature.notebook.exists()


def test_command_refuses_lessons_that_are_not_written(
    miniature: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature.source.unlink()
    with pytest.raises(LessonError, match="lesson 02 is not written yet"):
        run(monkeypatch, miniature, "02")
