"""The seven gates, on every written lesson; for one: `python3 -m course_lib test tests/lessons -k 01_basic`."""

from __future__ import annotations

import pytest

from course_lib.teaching.building import gates
from course_lib.teaching.building.budgets import is_well_formed
from course_lib.teaching.catalogue import Lesson, lessons

WRITTEN = [lesson for lesson in lessons() if lesson.is_written]
each_lesson = pytest.mark.parametrize("lesson", WRITTEN, ids=[lesson.name for lesson in WRITTEN])


def passes(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n\n".join(problems), pytrace=False)


@each_lesson
def test_1_same_cells(lesson: Lesson) -> None:
    passes(gates.same_cells(lesson))


@pytest.mark.slow
@each_lesson
def test_2_solved_runs(lesson: Lesson) -> None:
    passes(gates.solved_runs(lesson))


@each_lesson
def test_3_stubs_fail(lesson: Lesson) -> None:
    passes(gates.stubs_fail(lesson))


@each_lesson
def test_4_answers_are_judged(lesson: Lesson) -> None:
    passes(gates.answers_are_judged(lesson))


@each_lesson
def test_5_solutions_hidden(lesson: Lesson) -> None:
    passes(gates.solutions_hidden(lesson))


@pytest.mark.slow
@each_lesson
def test_6_learner_runs(lesson: Lesson) -> None:
    passes(gates.learner_runs(lesson))


@each_lesson
def test_7_is_well_formed(lesson: Lesson) -> None:
    passes(is_well_formed(lesson, lessons()))
