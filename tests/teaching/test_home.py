"""The home page and `progress`: where the learner is, what comes next, links that lead there."""

from __future__ import annotations

import re

import pytest

from course_lib.teaching import catalogue
from course_lib.teaching.learner import home
from course_lib.teaching.learner.home import home_page, terminal_page, write_home
from course_lib.teaching.learner.progress import Progress, ProgressStore
from course_lib.teaching.learner.workspace import update
from tests.teaching.miniatures import make_lesson


@pytest.fixture
def two_lessons(tmp_path, monkeypatch):
    lessons = tuple(make_lesson(tmp_path / "repository", monkeypatch, number) for number in ("01", "02"))
    lessons[1].source.unlink()
    lessons[1].notebook.unlink()
    monkeypatch.setattr(home, "lessons", lambda: lessons)
    return lessons


def passed(work, *exercises) -> Progress:
    store = ProgressStore(work)
    for exercise in exercises:
        store.record_attempt(exercise, "passed", "")
    return store.read()


def test_a_new_learner_sees_where_to_begin(two_lessons):
    page = home_page(Progress(), two_lessons)
    assert "0 of 2 exercises passed. Lessons written so far: 1 of 2." in page
    assert (
        "**Next: [01 Mini](stage1_core/01_mini.ipynb), exercise 01.1.** The whole lesson takes 45 minutes."
        in page
    )
    assert "| 01 | [Mini](stage1_core/01_mini.ipynb) | 45 | squares &#124; cubes | 0 of 2 exercises |" in page
    assert "| 02 | Mini | 45 | squares &#124; cubes | not written yet |" in page


def test_what_is_done_shows_and_what_is_next_moves_on(two_lessons, tmp_path):
    first = passed(tmp_path, "01.1")
    assert "exercise 01.2.**" in home_page(first, two_lessons)
    assert "| 1 of 2 exercises |" in home_page(first, two_lessons)
    both = passed(tmp_path, "01.2")
    assert "Next:" not in home_page(both, two_lessons) and "| ✓ 2 of 2 exercises |" in home_page(
        both, two_lessons
    )


def test_a_pass_that_failed_when_checked_last_stays_and_is_told(two_lessons, tmp_path):
    passed(tmp_path, "01.1", "01.2")
    store = ProgressStore(tmp_path)
    store.record_attempt("01.2", "wrong", "")
    said = "✓ 2 of 2 exercises; passed earlier, failed when checked last: 01.2"
    assert f"| {said} |" in home_page(store.read(), two_lessons)
    assert f"  {said}\n" in terminal_page(store.read(), two_lessons, tmp_path)
    store.record_attempt("01.2", "passed", "")
    assert "| ✓ 2 of 2 exercises |" in home_page(store.read(), two_lessons)


def test_what_cannot_be_checked_here_keeps_nobody_from_going_on(two_lessons, tmp_path):
    passed(tmp_path, "01.1")
    store = ProgressStore(tmp_path)
    store.record_verdict("01.2", "unavailable")
    page = home_page(store.read(), two_lessons)
    assert "| ✓ 1 of 2 exercises; cannot be checked here: 01.2 |" in page and "Next:" not in page


def test_the_written_page_links_to_what_is_there(two_lessons, tmp_path):
    update(tmp_path, two_lessons, {})
    page = write_home(tmp_path, ProgressStore(tmp_path))
    assert page == tmp_path / "HOME.md"
    links = set(re.findall(r"\]\((.*?)\)", page.read_text())) - {"welcome.ipynb"}
    assert links == {"stage1_core/01_mini.ipynb"} and all((tmp_path / link).exists() for link in links)


def test_every_lesson_of_the_course_is_on_the_page():
    page = home_page(Progress(), catalogue.lessons())
    assert all(f"\n| {lesson.number} | " in page for lesson in catalogue.lessons())
    assert all(f"## {title}" in page for title in catalogue.STAGES.values())
    columns = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert columns == {6}


def test_the_terminal_says_the_same(two_lessons, tmp_path):
    said = terminal_page(passed(tmp_path, "01.1"), two_lessons, tmp_path).splitlines()
    assert said[:2] == [
        "1 of 2 exercises passed. Lessons written so far: 1 of 2.",
        f"Next: 01 Mini, exercise 01.2, in {tmp_path / 'stage1_core' / '01_mini.ipynb'}",
    ]
    assert "  01  Mini   45 min  1 of 2 exercises" in said and "  02  Mini   45 min  not written yet" in said
