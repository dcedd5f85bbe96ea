"""`lab`, `check` and `progress`: what they say, and that nothing stops the rest."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from course_lib.bootstrap import lab
from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError, SetupError
from course_lib.teaching import catalogue, commands
from course_lib.teaching.learner import grading, home
from course_lib.teaching.learner.grading import ExerciseGrade, Grade
from course_lib.teaching.learner.progress import ProgressStore
from course_lib.teaching.notebook_files import read_notebook
from tests.teaching.miniatures import make_lesson


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture
def lesson(tmp_path, monkeypatch, work):
    """The only lesson that there is."""
    lesson = make_lesson(tmp_path / "repository", monkeypatch)
    for module in (catalogue, home):
        monkeypatch.setattr(module, "lessons", lambda: (lesson,))
    return lesson


def check(number="01") -> int:
    return commands.run_check(argparse.Namespace(lesson=number))


def test_lab_opens_the_home_page(lesson, work, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(lab, "become_jupyterlab", lambda *args, **kwargs: opened.append((args, kwargs)))
    commands.run_lab(argparse.Namespace(no_browser=True, port=9000))
    [((page, environment), settings)] = opened
    assert page == work / "HOME.md" and settings == {"browser": False, "port": 9000}
    assert environment["COURSE_WORK"] == str(work)
    assert {path.name for path in work.iterdir()} == {"HOME.md", "welcome.ipynb", "stage1_core"}
    assert capsys.readouterr().out.splitlines() == [
        f"Your copies of the lessons are made in {work}: 01.",
        "Opening JupyterLab. Stop it with Ctrl-C here, twice.",
    ]


def test_lab_opens_what_there_is_when_something_cannot_be_written(lesson, work, capsys):
    (work / "HOME.md").mkdir(parents=True)
    lesson.work_copy(work).mkdir(parents=True)
    assert commands.prepare(work) == work / "welcome.ipynb"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "01_mini.ipynb: not written" in said[0]
    assert "home page could not be written" in said[1]


def test_lab_without_a_work_folder_says_what_to_do(lesson, work):
    work.write_text("a file in its place")
    with pytest.raises(SetupError, match="cannot be made .*COURSE_WORK"):
        commands.prepare(work)


def test_progress_of_a_newer_edition_does_not_stop_lab(lesson, work, capsys):
    work.mkdir()
    (work / "progress.json").write_text('{"version": 99}')
    assert commands.prepare(work).exists() and lesson.work_copy(work).exists()
    assert "newer edition" in capsys.readouterr().out


def test_check_of_a_lesson_never_opened(lesson, work, capsys):
    assert check() == 1 and lesson.work_copy(work).exists()
    assert capsys.readouterr().out == (
        f"Your copies of the lessons are made in {work}: 01.\n"
        "You have not worked on lesson 01 yet: there is nothing to check."
        " `python3 -m course_lib lab` opens it.\n"
    )


def test_check_of_lessons_that_are_not_there(lesson):
    with pytest.raises(CourseError, match="no lesson 'basics'"):
        check("basics")
    lesson.source.unlink()
    with pytest.raises(CourseError, match="lesson 01 is not written yet"):
        check()


@pytest.mark.parametrize("passed", [True, False])
def test_the_status_of_check_is_the_grade(lesson, work, monkeypatch, capsys, passed):
    commands.prepare(work)
    grade = Grade((ExerciseGrade("01.1", passed, "01.1 · it"),), ("Trouble",))
    monkeypatch.setattr(grading, "grade", lambda *_: grade)
    assert check() == (0 if passed else 1)
    said = capsys.readouterr().out
    assert f"Checking {lesson.work_copy(work)} as saved at " in said
    assert said.endswith(f"01.1 · it\n\nTrouble\n\n{int(passed)} of 1 exercises passed.\n")


def test_check_recovers_a_damaged_notebook_first(lesson, work, monkeypatch, capsys):
    commands.prepare(work)
    ProgressStore(work).record_attempt("01.2", "wrong", "what I had")
    lesson.work_copy(work).write_text("{")
    monkeypatch.setattr(grading, "grade", lambda *_: Grade((), ()))
    check()
    assert "was damaged" in capsys.readouterr().out
    assert "what I had" in [cell["source"] for cell in read_notebook(lesson.work_copy(work))["cells"]]


def test_check_without_the_solved_lesson_is_one_sentence(lesson, work):
    commands.prepare(work)
    lesson.solution_notebook.unlink()
    with pytest.raises(CourseError, match="could not be checked.*solutions"):
        check()


def test_progress_works_on_a_bare_python(tmp_path):
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path), "COURSE_WORK": str(tmp_path / "work")}
    command = [sys.executable, "-S", "-m", "course_lib", "progress"]
    answer = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert " exercises passed. Lessons written so far: " in answer.stdout
    assert list(tmp_path.iterdir()) == []
