"""Exercise files: what loads, and that an incomplete or contradictory one is refused with its name."""

from __future__ import annotations

import os

import pytest

from course_lib.teaching.checking.exercise_file import Case, Choice, Question, load_exercises

GOOD = '''
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

double = Exercise("01.1", "Double it", target=None, stars=1, minutes=5, importance="core",
                  hints=("a", "b", "c"))

@double.cases
def _(rng):
    yield Case("two", 2)
    yield Case("random", x=rng.randrange(100), may_change=("x",))

@double.expected
def _(x):
    return x + x

@double.symptom("zero", "Yours is zero.")
def _(failure):
    return failure.got == 0

@double.wrong("zero")
def _(x):
    return 0

@double.mistake("square", "You squared it.")
def _(x):
    return x * x

@double.accepts
def _(x):
    return 2 * x

which = Question("01.a", "How many?", [Choice("one", "no"), Choice("two", "yes", right=True)])
'''


@pytest.fixture
def load(tmp_path):
    def write_and_load(source):
        path = tmp_path / "01_doubling.py"
        path.write_text(source)
        return load_exercises(path)
    return write_and_load


def test_a_file_gives_its_exercises_and_questions_by_id(load):
    found = load(GOOD)
    assert list(found.exercises) == ["01.1"] and list(found.questions) == ["01.a"]
    exercise = found.exercises["01.1"]
    assert [name for name, _ in exercise.wrong_answers] == ["zero", "square"]  # a mistake is one
    assert list(exercise.diagnostics) == ["zero", "square"]
    assert found.questions["01.a"].right.text == "two"


def test_an_obstacle_is_a_package_that_is_not_there(load):
    needing = 'needs=("{}", "It exists for Linux only."), stars=1'
    there, missing = (load(GOOD.replace("stars=1", needing.format(name))).exercises["01.1"]
                      for name in ("json", "no_such_package"))
    assert there.obstacle is None and load(GOOD).exercises["01.1"].obstacle is None
    assert missing.obstacle == "It exists for Linux only."


def test_cases_come_from_two_seeds_and_are_the_same_every_time(load):
    exercise = load(GOOD).exercises["01.1"]
    first, again = ([(case.args, case.kwargs) for case in exercise.make_cases()] for _ in range(2))
    assert first == again and len(first) == 4
    assert first[1] != first[3]


@pytest.mark.parametrize(("before", "after", "message"), [
    ("@double.cases", "@double.accepts", "exercise 01.1: it has no @cases"),
    ("@double.expected", "@double.accepts", "exercise 01.1: it has no @expected"),
    ('wrong("zero")', 'wrong("nil")', "no symptom or mistake of it: nil"),
    ('mistake("square"', 'mistake("zero"', "two diagnostics named 'zero'"),
    ("@double.accepts", "@double.expected", "two functions marked @expected"),
    ("@double.accepts", "@double.wasteful", "@budget needs a @wasteful"),
    ("@double.accepts", '@double.budget("too many", most=1, unit="sort")', "@budget needs a @wasteful"),
    ('("a", "b", "c")', '("a", "b")', "hints should be three"),
    ("stars=1", "stars=5", "stars should be"),
    ("stars=1", 'needs="triton", stars=1', "needs should be the name of a package and a sentence"),
    ("stars=1", 'needs=("triton.language", "Linux only."), stars=1', "needs should be the name of a package"),
    ('"core"', '"vital"', "importance should be one of core, useful, extra"),
    ("target=None", 'target="course_lib.sampling"', "target should look like"),
    ('"01.1"', '"1.1"', "id should look like"),
    ('"01.1"', '"02.1"', "01_doubling.py: the id 02.1 belongs to another lesson"),
    ("which =", "same = double\nwhich =", None),  # a second name for one exercise is no second exercise
    ("which =", 'more = Question("01.a", "?", [Choice("a", "", right=True), Choice("b", "")])\nwhich =',
     "the id 01.a is used twice"),
    (", right=True", "", "exactly one choice with right=True"),
    ('"01.a"', '"01.1"', "should look like '01.a'"),
    ('Choice("one", "no")', 'Choice("two", "no")', "all different"),
])
def test_an_incomplete_file_is_refused(load, before, after, message):
    assert before in GOOD
    if message is None:
        load(GOOD.replace(before, after))
        return
    with pytest.raises(ValueError, match=message):
        load(GOOD.replace(before, after))


def test_a_case_that_does_not_fit_is_refused(load):
    with pytest.raises(ValueError, match="case 'random': may_change names y"):
        load(GOOD.replace('may_change=("x",)', 'may_change=("y",)')).exercises["01.1"].make_cases()
    with pytest.raises(ValueError, match="case 'random': retold names y"):
        load(GOOD.replace('may_change=("x",)', 'retold=("y",)')).exercises["01.1"].make_cases()
    with pytest.raises(ValueError, match="yields no case"):
        load(GOOD.replace("yield Case", "return\n    yield Case", 1)).exercises["01.1"].make_cases()


def test_shortcomings_name_what_a_finished_exercise_lacks(load):
    exercise = load(GOOD.replace("@double.accepts", "@double.wrong('square')")
                        .replace('@double.wrong("zero")', "@double.wrong('square')")).exercises["01.1"]
    assert exercise.shortcomings() == ("no @wrong answer shows the symptom 'zero'",
                                       "it has no @accepts: a right answer in another style")
    assert load(GOOD).exercises["01.1"].shortcomings() == ("it has 2 wrong answers, and needs three",)


def test_a_file_runs_again_only_when_it_changed(load, tmp_path):
    path = tmp_path / "01_doubling.py"
    first = load(GOOD)
    assert load_exercises(path) is first
    time = path.stat().st_mtime_ns
    path.write_text(GOOD.replace("You squared it", "You halved it!"))  # of the same size, in the same second
    os.utime(path, ns=(time + 1000, time + 1000))
    assert load_exercises(path).exercises["01.1"].diagnostics["square"].message == "You halved it!."


def test_arguments_are_named_as_expected_names_them(load):
    exercise = load(GOOD.replace("def _(x):\n    return x + x", "def _(x, *more, last=0):\n    return x")
                    ).exercises["01.1"]
    assert exercise.argument_names(Case("", 1, 2, 3, last=4)) == ("x", "more[0]", "more[1]", "last")
    with pytest.raises(TypeError, match="unexpected keyword"):
        exercise.argument_names(Case("", 1, first=4))


def test_a_question_takes_any_sequence_of_choices():
    assert isinstance(Question("01.b", "?", [Choice("a", "", right=True), Choice("b", "")]).choices, tuple)
