"""What an answer is told: every kind of verdict, whatever the answer does."""

from __future__ import annotations

import asyncio
import builtins
import functools
import linecache
import random
import sys
import textwrap
import time

import pytest
import torch

from course_lib.teaching.checking import judging
from course_lib.teaching.checking.answer_code import does_nothing
from course_lib.teaching.checking.counting import count_torch_calls
from course_lib.teaching.checking.exercise_file import Case, Exercise
from course_lib.teaching.checking.judging import HEADLINES, Verdict, judge


def new_exercise():
    return Exercise("01.2", "", target=None, stars=1, minutes=1, importance="core", hints=("a", "b", "c"))


@pytest.fixture
def largest():
    """The k largest of a list, in descending order."""
    exercise = new_exercise()

    @exercise.cases
    def _(rng):
        yield Case("three numbers", [3, 1, 2], k=2)
        yield Case("random numbers", [rng.randrange(1000) for _ in range(9)], k=4)

    @exercise.expected
    def _(numbers, k):
        return sorted(numbers, reverse=True)[:k]

    @exercise.symptom("all", "Yours returns all of them.")
    def _(failure):
        return len(failure.got) == len(failure.args[0])

    @exercise.mistake("ascending", "Yours are in ascending order.")
    def _(numbers, k):
        return sorted(numbers)[-k:]

    @exercise.mistake("index", "Your index runs off the end.")
    def _(numbers, k):
        return [sorted(numbers)[-i] for i in range(100)]

    @exercise.mistake("in-place", "Your sort() sorts the caller's list.")
    def _(numbers, k):
        numbers.sort(reverse=True)
        return numbers[:k]
    return exercise


def right(numbers, k):
    return sorted(numbers)[::-1][:k]


def in_notebook(source, **names):
    """The last thing defined by a cell, as IPython would compile it."""
    source = textwrap.dedent(source)
    filename = f"/tmp/ipykernel_1/{abs(hash(source))}.py"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space = {"__name__": "__main__", **names}
    exec(compile(source, filename, "exec"), space)
    return list(space.values())[-1]


FIRST_CASE = """\
Case: three numbers
  numbers = [3, 1, 2]
  k = 2
Expected: [3, 2]"""


def test_passed(largest):
    verdict = judge(largest, right)
    assert verdict == Verdict("passed", "01.2", "All 4 cases are right.") and verdict.passed
    assert verdict.text() == "01.2 · passed\nAll 4 cases are right."


def test_every_wrong_answer_is_told_its_own_diagnostic(largest):
    for name, answer in largest.wrong_answers:
        verdict = judge(largest, answer)
        assert (verdict.kind, verdict.diagnostic) == ("mistake", name)
    assert judge(largest, lambda numbers, k: sorted(numbers)).diagnostic == "all"


def test_a_mistake_must_be_the_same_in_every_case(largest):
    def nearly(numbers, k):  # as the ascending mistake in the first case, which fails, but not in the others
        return sorted(numbers)[-k:] if k == 2 else right(numbers, k)
    verdict = judge(largest, nearly)
    assert verdict.text() == ("01.2 · not right yet\n`result[0]` is 2, it should be 3.\n"
                              f"{FIRST_CASE}\nYours: [2, 3]")


def test_a_mistake_that_raises_needs_the_same_exception(largest):
    def raises(error):
        def answer(numbers, k):
            raise error
        return answer
    assert judge(largest, raises(IndexError("other words"))).diagnostic == "index"
    assert judge(largest, raises(KeyError())).kind == "raised"


def test_diagnostics_are_tried_in_order(largest):
    @largest.mistake("later", "")
    def ascending_too(numbers, k):
        return sorted(numbers)[-k:]
    assert judge(largest, ascending_too).diagnostic == "ascending"


def test_a_right_result_is_not_told_a_symptom_of_a_wrong_one(largest):
    @largest.symptom("anything", "It is wrong.")
    def always(failure):
        return failure.error is None

    @largest.symptom("clears", "You clear the list.")
    def clears(failure):
        return "numbers" in failure.changed

    def clearing(numbers, k):
        best = right(numbers, k)
        numbers.clear()
        return best

    del largest.diagnostics["in-place"]
    assert judge(largest, clearing).diagnostic == "clears"
    del largest.diagnostics["clears"]
    assert "The result is right, but your code changed" in judge(largest, clearing).text()


def test_an_error_names_the_line_of_the_notebook(largest):
    answer = in_notebook("""
        def helper(numbers):
            return numbers["k"]

        def answer(numbers, k):
            return helper(numbers)
        """)
    assert judge(largest, answer).text() == (
        "01.2 · your code raised an error\n"
        "TypeError: list indices must be integers or slices, not str\n"
        f'It happened in `helper`, line 3: return numbers["k"]\n{FIRST_CASE}')
    assert "where the check calls your code" in judge(largest, lambda numbers: 1).message
    largest.symptom("arguments", "It takes two arguments.")(lambda failure: isinstance(failure.error, TypeError))
    told = judge(largest, lambda numbers: 1).message  # the symptom says what is wrong
    assert told.startswith("It takes two arguments.\nTypeError: ") and "where the check calls" not in told


LIBRARY = in_notebook("""
    class Library:
        def run(kernel, *args):
            try:
                return kernel(*args)
            except Exception as error:
                raise RuntimeError(repr(error)) from error

        def run_implicitly(kernel, *args):
            try:
                return kernel(*args)
            except Exception:
                raise RuntimeError("wrapped")

        def run_silently(kernel, *args):
            try:
                return kernel(*args)
            except Exception:
                raise RuntimeError("wrapped") from None

        def fails():
            raise ValueError("of the library")
    """)


@pytest.mark.parametrize(("run", "told"), [
    ("run", "KeyError: 'k'\nIt happened in `kernel`, line 3: return {}[k]"),
    ("run_implicitly", "KeyError: 'k'\nIt happened in `kernel`, line 3: return {}[k]"),
    ("run_silently",
     "RuntimeError: wrapped\nIt happened in `answer`, line 6: return library.RUN(kernel, 'k')"),
])
def test_an_error_under_a_wrapper_names_the_line_that_raised_it(largest, run, told):
    answer = in_notebook("""
        def kernel(k):
            return {}[k]

        def answer(numbers, k):
            return library.RUN(kernel, 'k')
        """.replace("RUN", run), library=LIBRARY)
    assert judge(largest, answer).message == told.replace("RUN", run)


def test_an_error_in_the_learners_own_handler_is_told_itself(largest):
    answer = in_notebook("""
        def answer(numbers, k):
            try:
                return numbers["k"]
            except TypeError:
                return library.fails()
        """, library=LIBRARY)
    assert judge(largest, answer).message == (
        "ValueError: of the library\nIt happened in `answer`, line 6: return library.fails()")


def test_errors_tied_into_a_ring_are_told(largest):
    def answer(numbers, k):
        error = ValueError("round")
        error.__context__ = KeyError()
        error.__context__.__context__ = error
        raise error
    assert judge(largest, answer).message.startswith("ValueError: round\nIt happened in `answer`")


def test_the_first_difference_is_shown_where_the_results_are_cut(largest):
    lives = [{"step": i, "who": "a request", "blocks": [i, i + 1]} for i in range(24)]
    largest.expected_function = lambda numbers, k: lives

    def answer(numbers, k):
        return [life if life["step"] < 17 else {**life, "blocks": [17, 0]} for life in lives]
    plain, told = judge(largest, answer), "`result[17]['blocks'][1]` is 0, it should be 18."
    assert plain.message == told and "The first difference" not in plain.text()

    largest.symptom("release", "You release too early.")(lambda failure: True)
    verdict = judge(largest, answer)
    assert verdict.message == "You release too early." and verdict.text().endswith(
        f"(24 elements)\nThe first difference: {told}")
    largest.expected_function = lambda numbers, k: lives[:2]
    assert "The first difference" not in judge(largest, lambda numbers, k: lives[:1]).text()  # all is shown
    largest.same(lambda got, expected, case: False)
    largest.expected_function = lambda numbers, k: lives
    assert "The first difference" not in judge(largest, answer).text()


@pytest.fixture
def till():
    """A till that is rung and emptied."""
    exercise = new_exercise()

    @exercise.cases
    def _(rng):
        yield Case("a short day", 1, [f"ring {i}" for i in range(4)], retold=["events"])
        yield Case("a long day", 1, [f"ring {i}" for i in range(30)], retold=["events"])

    @exercise.run
    def _(answer, price, events):
        return [f"{event} -> {answer(price, event)}" for event in events]

    @exercise.expected
    def _(price, events):
        return [f"{event} -> {price}" for event in events]
    return exercise


def test_events_are_told_one_a_line_until_the_first_that_differs(till):
    verdict = judge(till, lambda price, event: 2 if event == "ring 2" else 1)
    assert verdict.text() == """\
01.2 · not right yet
The last event below should have another outcome.
Case: a short day
  price = 1
As expected:
  ring 0 -> 1
  ring 1 -> 1
Expected: ring 2 -> 1
Yours:    ring 2 -> 2"""
    late = judge(till, lambda price, event: 2 if event == "ring 20" else 1).text()
    assert "As expected:\n  … (8 lines as expected)\n  ring 8 -> 1\n" in late and late.endswith("ring 20 -> 2")
    first = judge(till, lambda price, event: 2).text()
    assert first.endswith("  price = 1\nExpected: ring 0 -> 1\nYours:    ring 0 -> 2")


def test_events_that_are_missing_or_end_in_an_error_are_told_as_well(till):
    run = till.run_function
    till.run_function = lambda answer, price, events: run(answer, price, events)[:3]
    assert judge(till, lambda price, event: 1).text().endswith(
        "  ring 2 -> 1\nExpected: ring 3 -> 1\nYours:    (nothing more)")

    def fails(answer, price, events):
        error = KeyError("x")
        error.add_note("The call: ring 1")
        raise error
    till.run_function = fails
    verdict = judge(till, lambda price, event: 1)
    assert verdict.message.startswith("KeyError") and verdict.message.endswith("\nThe call: ring 1")
    assert verdict.text().endswith("Expected:\n" + "\n".join(f"  ring {i} -> 1" for i in range(4)))
    till.run_function = lambda answer, price, events: "no lines"
    assert judge(till, lambda price, event: 1).text().endswith("Yours: 'no lines'")


def test_a_right_result_is_not_told_a_mistake_that_changes_nothing(largest):
    @largest.mistake("seldom", "Wrong for odd k.")
    def _(numbers, k):
        return right(numbers, k)

    def sorts(numbers, k):  # the right result, and the caller's list is changed in another way than "in-place"
        best = right(numbers, k)
        numbers.append(0)
        return best
    verdict = judge(largest, sorts)
    assert verdict.diagnostic == "in-place"
    del largest.diagnostics["in-place"]
    assert judge(largest, sorts).diagnostic is None
    assert judge(largest, sorts).message.startswith("The result is right, but your code changed")


def test_what_needs_a_package_that_is_not_there_is_not_judged(largest, monkeypatch):
    largest.needs = ("no_such_package", "It exists for Linux only.")
    monkeypatch.setattr(largest, "cases_function", None)
    verdict = judge(largest, right)
    assert verdict.text() == "01.2 · cannot be checked here: It exists for Linux only."
    assert not verdict.passed and verdict.diagnostic is None


def test_wrong_type(largest):
    def tensor(numbers, k):
        return torch.tensor(right(numbers, k))
    verdict = judge(largest, tensor)
    assert verdict.text() == (
        "01.2 · wrong type or shape\nThe result is a torch tensor, it should be a list: convert it with "
        f"x.tolist().\n{FIRST_CASE}\nYours: [3, 2] (int64, shape [2])")
    assert judge(largest, lambda numbers, k: None).message.startswith("Your code returned None instead")


def test_a_changed_argument_fails_unless_the_case_allows_it(largest):
    largest.diagnostics.clear()
    _, in_place = largest.wrong_answers[-1]
    verdict = judge(largest, in_place)
    assert (verdict.kind, verdict.message) == (
        "wrong", "The result is right, but your code changed its argument `numbers` in place, "
                 "which its caller still needs: work on a copy.")

    def wrong_too(numbers, k):
        return numbers.pop()
    assert any("changed its argument `numbers`" in note for note in judge(largest, wrong_too).notes)

    def cases(rng):
        yield Case("", [3, 1, 2], k=2, may_change=("numbers",))
    largest.cases_function = cases
    assert judge(largest, in_place).passed


def test_a_budget_counts_work():
    exercise = new_exercise()
    exercise.cases(lambda rng: iter([Case("", torch.tensor([2.0, 1.0]))]))
    exercise.expected(lambda x: torch.tensor(sorted(x.tolist())))
    exercise.budget("Sort once.", most=1, unit="sort")(
        lambda answer: count_torch_calls(answer, torch.tensor([1.0]))["sort"])
    assert judge(exercise, lambda x: x.sort().values).passed
    assert judge(exercise, lambda x: x.sort().values.sort().values).text() == (
        "01.2 · right, but does too much work\nSort once.\nCounted (sort): yours 2, enough 1.")
    assert judge(exercise, lambda x: x.sort().values if len(x) > 1 else 1 / 0).kind == "raised"


@pytest.mark.parametrize("source", [
    "def answer(numbers, k):\n    '''What it does.'''\n    ...",
    "def answer(numbers, k): pass",
    "async def answer(numbers, k):\n    ...  # your code here",
    "class Answer:\n    def __init__(s): s.a = 1\n    @property\n    def b(s): 'doc'\n    def c(s): ...",
    "class Answer: ...",
])
def test_an_empty_body_is_not_done(largest, source):
    verdict = judge(largest, in_notebook(source))
    assert verdict.kind == "not done" and 'hint("01.2")' in verdict.text()


@pytest.mark.parametrize("source", [
    "def answer(numbers, k): return None",
    "class Answer:\n    def b(self): ...\n    @staticmethod\n    def c(): return 1",
    "class Answer:\n    def __init__(self): self.a = 1",
    "class Answer:\n    @property\n    def b(self): return 1",
    "class Answer:\n    @functools.cached_property\n    def b(self): return 1",
    "class Answer:\n    @classmethod\n    def b(cls): return 1",
    "@functools.lru_cache\ndef answer(numbers, k): return 1",
    "answer = lambda numbers, k: ...",
    "answer = sorted",
])
def test_a_body_that_does_something_is_judged(source):
    assert not does_nothing(in_notebook(source, functools=functools))


def test_code_that_does_not_end_is_told_so_within_the_time(largest, monkeypatch):
    monkeypatch.setattr(judging, "SECONDS", 0.3)

    def endless(numbers, k):
        while True:
            pass

    def slow(numbers, k):  # each call is quick, all of them together are not
        time.sleep(0.2)
        return right(numbers, k)
    for answer in (endless, slow):
        start = time.monotonic()
        verdict = judge(largest, answer)
        assert verdict.kind == "wrong" and verdict.message.startswith("Your code was stopped after 0.3 sec")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(("act", "kind", "message"), [
    (lambda: sys.exit(), "raised", "Your code called sys.exit(), which ends Python"),
    (lambda: exec("def f(): f()\nf()", {}), "raised", "RecursionError: a function calls itself without end."),
    (lambda: (_ for _ in ()).throw(GeneratorExit), "raised", "GeneratorExit"),
    (lambda: asyncio.sleep, "wrong shape", "The result is a function, it should be a list."),
    (lambda: "x" * 10_000_000, "wrong shape", "The result is a str, it should be a list."),
    (lambda: [0] * 10_000_000, "wrong", "The result has 10,000,000 elements, it should have 2."),
])
def test_odd_behaviour_is_met_calmly(largest, act, kind, message):
    verdict = judge(largest, lambda numbers, k: act())
    assert (verdict.kind, verdict.passed) == (kind, False) and verdict.message.startswith(message)
    assert len(verdict.text()) < 1000


def test_a_self_referential_result_is_shown_short(largest):
    def answer(numbers, k):
        result = [1]
        result.append(result)
        return result
    assert judge(largest, answer).text().endswith("Yours: [1, [1, [1, […]]]]")


def test_notes_on_what_the_code_printed_replaced_and_hides(largest):
    answer = in_notebook("""
        max = min = 3

        def answer(numbers, k):
            builtins.sum = None
            print("x" * 200, "\\nk is", k)
            return [sorted(numbers)[::-1][:k] for _ in numbers if max == open][0] if k else numbers.min
        """, builtins=builtins, open=3)  # every notebook has an `open` of IPython's
    verdict = judge(largest, answer)
    assert verdict.passed and verdict.text() == (
        "01.2 · passed\nAll 4 cases are right.\n"
        "Note: your code printed 836 characters, which a check does not show.\n"
        "Note: your code replaced Python's `sum`: put back.\n"
        "Note: your notebook has a variable named `max`, which hides Python's. To undo: del max")
    failed = judge(largest, lambda numbers, k: [print(f"{'x' * 300}\n{k}\n" * 100_000), numbers][1])
    assert failed.notes[0].splitlines()[:3] == ["in this case your code printed 30,300,001 characters:",
                                                "  " + "x" * 100, "  2"]
    assert len(failed.notes[0]) < 1000 and failed.notes[0].endswith("…")


def test_a_builtin_hidden_from_a_helper_is_told_too(largest):
    answer = in_notebook("""
        def helper(numbers, k): return max(numbers)[:k]
        def answer(numbers, k): return helper(numbers, k) if numbers else answer([1], k)
        """, max=3)
    assert "named `max`, which hides Python's" in judge(largest, answer).text()


def test_a_hidden_builtin_that_the_answer_does_not_use_is_no_matter(largest):
    answer = in_notebook("def answer(numbers, k): return sorted(numbers)[::-1][:k]", max=3)
    assert judge(largest, answer).notes == ()


def test_random_code_is_judged_the_same_every_time(largest):
    def answer(numbers, k):
        return random.sample(range(1000), k) + [torch.rand(1).item()]
    assert judge(largest, answer).text() == judge(largest, answer).text()


def test_cases_that_draw_from_torch_are_the_same_every_time_and_disturb_nothing():
    exercise = new_exercise()
    exercise.cases(lambda rng: iter([Case("", torch.rand(2))]))
    exercise.expected(lambda x: x * 2)
    state = torch.get_rng_state()
    first, again = judge(exercise, lambda x: x + 1).text(), judge(exercise, lambda x: x + 1).text()
    assert first == again and torch.equal(torch.get_rng_state(), state)


def test_a_class_is_used_by_run_and_compared_by_same():
    exercise = new_exercise()
    exercise.cases(lambda rng: iter([Case("", answer=3)]))
    exercise.run(lambda kind, /, answer: kind(answer).numbers())
    exercise.expected(lambda answer: {1, 2})
    exercise.same(lambda got, expected, case: got in expected)

    def kind(result):
        class Answer:
            def __init__(self, x): self.x = x
            def numbers(self): return result
        return Answer
    assert judge(exercise, kind(2)).passed
    assert judge(exercise, kind(3)).message == "The result is not right in this case."
    assert judge(exercise, kind([])).kind == "wrong"  # `same` raises: [] is not hashable
    assert judge(exercise, kind(None)).kind == "wrong shape"


def test_what_the_truth_does_to_its_arguments_is_not_shown(largest):
    def expected(numbers, k):
        numbers.sort(reverse=True)
        return numbers[:k]
    largest.expected_function = expected
    assert judge(largest, lambda numbers, k: 1).example == f"{FIRST_CASE}\nYours: 1"


def test_callables_that_are_no_functions_are_judged(largest):
    class Callable:
        def __call__(self, numbers, k): return right(numbers, k)
    assert judge(largest, functools.partial(right)).passed
    assert judge(largest, Callable()).passed
    assert judge(largest, 5).kind == "raised"


def test_a_fault_of_the_exercise_is_not_blamed_on_the_answer(largest):
    def broken(numbers, k):
        raise ZeroDivisionError
    largest.expected_function = broken
    with pytest.raises(ZeroDivisionError):
        judge(largest, right)


def test_every_kind_has_a_headline():
    assert {kind: Verdict(kind, "01.2", "").text() for kind in HEADLINES} == {
        kind: f"01.2 · {headline}" for kind, headline in HEADLINES.items()}
