"""exercise, check, hint, solution: what a learner reads at every turn, and what is recorded of it."""

from __future__ import annotations

import builtins
import functools
import importlib.util
import sys
from pathlib import Path

import pytest

import course_lib.teaching
from course_lib.errors import CourseError
from course_lib.teaching import catalogue, check, exercise, hint, solution
from course_lib.teaching.learner.answers import answer_path, load_answer
from course_lib.teaching.learner.session import current_session
from tests.teaching.tiny_lesson import Notebook

STUB = "..."
RIGHT = "return probs.argmax(dim=-1)"
WRONG = "return probs.argmin(dim=-1)"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    return lambda: capsys.readouterr().out


def test_the_way_from_the_stub_to_a_pass(notebook: Notebook, said) -> None:
    check("01.1")
    assert said() == (
        "01.1 · not done yet\n"
        'The cell with @exercise("01.1") has not run yet: run it first, then come back here.\n'
    )
    notebook.answer("01.1", STUB)
    check("01.1")
    stub = said()
    assert stub.startswith("01.1 · not done yet\nWrite the missing part")
    notebook.answer("01.1", '"""Only a docstring."""')
    check("01.1")
    assert said() == stub
    assert current_session().store.read().exercises == {}  # nothing of this was an attempt

    notebook.answer("01.1", WRONG)
    check("01.1")
    wrong = said()
    assert wrong.startswith("01.1 · not right yet\nYou take the smallest.\n")
    assert wrong.endswith('\nhint("01.1") helps in three steps.\n')
    notebook.answer("01.1", RIGHT)
    check("01.1")
    assert said() == "01.1 · passed\nAll 4 cases are right.\nlook: [1]\n"

    progress = current_session().store.read().of("01.1")
    assert (progress.attempts, progress.failures, progress.passed) == (2, 1, True)
    assert progress.last_source == f'@exercise("01.1")\ndef pick(probs):\n    {RIGHT}'
    assert load_answer(answer_path(current_session().store.work, "01.1")).__name__ == "pick"
    assert (current_session().store.work / "HOME.md").exists()


def test_the_solution_opens_after_three_failures(notebook: Notebook, said) -> None:
    notebook.answer("01.1", WRONG)
    solution("01.1")
    assert "after 3 more failed checks" in said()
    for _ in range(2):
        check("01.1")
    solution("01.1")
    assert said().endswith(
        "The solution opens when you pass, or after 1 more failed check. You may also read it now:\n"
        'solution("01.1", anyway=True)\n'
    )
    check("01.1")
    assert said().endswith('solution("01.1") is open now.\n')
    solution("01.1")
    assert said() == '@exercise("01.1")\ndef pick(probs):\n    return probs.argmax(dim=-1)\n'
    assert current_session().store.read().of("01.1").solution_seen


def test_the_solution_can_be_read_anyway(notebook: Notebook, said) -> None:
    solution("01.1", anyway=True)
    assert "return probs.argmax(dim=-1)" in said()
    assert current_session().store.read().of("01.1").solution_seen


def test_hints_come_one_by_one(notebook: Notebook, said) -> None:
    shown = []
    for _ in range(4):
        hint("01.1")
        shown.append(said())
    assert shown[0] == "Hint 1/3: Which entry is largest?\n"
    assert shown[1] == shown[0] + "Hint 2/3: There is a tensor method.\n"
    assert shown[2] == shown[3] == shown[1] + "Hint 3/3: argmax(dim=-1)\n"


def test_a_cell_that_raised(notebook: Notebook, said) -> None:
    notebook.run('1 / 0\n@exercise("01.1")\ndef pick(probs): return 1')
    check("01.1")
    assert said() == (
        "01.1 · not done yet\n"
        'The cell with @exercise("01.1") raised an error: mend it, run it again, then come back here.\n'
    )
    notebook.answer("01.1", RIGHT)
    notebook.answer("01.1", "return probs.argmax(dim=-1")
    check("01.1")
    assert (
        "The exercise's cell raised an error when it last ran: this is about the version before.\n" in said()
    )


def test_an_answer_that_cannot_leave_the_notebook_passes_and_is_told(notebook: Notebook, said) -> None:
    notebook.run("class Live:\n    dim = -1\nlive = Live()")
    notebook.answer("01.1", "return probs.argmax(dim=live.dim)")
    check("01.1")
    assert said() == (
        "01.1 · passed\nAll 4 cases are right.\n"
        "It cannot serve in the engine yet: your code uses `live` (Live), which exists in this notebook\n"
        "only: make it an argument, or define it in the exercise's cell.\n"
        "look: [1]\n"
    )
    assert current_session().store.read().of("01.1").passed
    assert not answer_path(current_session().store.work, "01.1").exists()


def test_an_answer_that_differs_outside_the_notebook_is_not_stored(notebook: Notebook, said) -> None:
    notebook.run("dims = [0]\ndims[0] = -1")
    notebook.run("def helper(probs): return probs.argmax(dim=shift)\nshift = -1")
    notebook.run('shift = 0\n@exercise("01.1")\ndef pick(probs): return helper(probs)')
    notebook.run("shift = -1")
    check("01.1")
    assert "cannot serve in the engine yet: outside this notebook the same code does not pass" in said()


def test_an_exercise_without_a_target_stores_nothing(notebook: Notebook, said) -> None:
    notebook.answer("01.3", "return layers * 2")
    check("01.3")
    assert said() == "01.3 · passed\nAll 2 cases are right.\n"
    assert not answer_path(current_session().store.work, "01.3").exists()


def test_a_pass_is_told_even_if_it_cannot_be_recorded(notebook: Notebook, said) -> None:
    current_session().store.work.write_text("in the way")
    notebook.answer("01.3", "return layers * 2")
    check("01.3")
    told = said()
    assert (
        told.startswith("01.3 · passed\n")
        and "This attempt is not recorded: your progress cannot be written" in told
    )
    solution("01.3", anyway=True)
    assert "return layers + layers" in said()


@pytest.mark.parametrize("function", [check, hint, solution])
@pytest.mark.parametrize(
    "identifier, sentence",
    [
        ("01.9", 'there is no exercise "01.9": lesson 01 has 01.1, 01.2, 01.3.'),
        ("02.1", "lesson 02 has no exercises: it is not written yet."),
        ("99.1", "There is no lesson '99'"),
        (1.2, 'exercises and questions are named by text in quotes: "01.2", "01.a".'),
    ],
)
def test_unknown_exercises_are_told(notebook: Notebook, said, function, identifier, sentence) -> None:
    function(identifier)
    assert said().startswith(sentence)


def test_exercise_refuses_what_it_does_not_know(notebook: Notebook) -> None:
    with pytest.raises(CourseError, match=r"lesson 01 has 01\.1, 01\.2, 01\.3"):
        exercise("01.9")
    with pytest.raises(CourseError, match="text in quotes"):
        exercise(lambda: None)  # @exercise without parentheses
    with pytest.raises(ValueError, match=r'target="course_lib.sampling.draw:draw": put that back'):
        exercise("01.1", target="course_lib.sampling.draw:draw_flat")
    with pytest.raises(TypeError, match="on top of a function or a class"):
        exercise("01.1")(functools.partial(min, 3))
    with pytest.raises(TypeError, match="on top of a function or a class"):
        exercise("01.1")(lambda probs: probs)


def test_everything_that_a_notebook_imports_is_there_and_no_module_hides_it() -> None:
    for name in course_lib.teaching.__all__:
        assert getattr(course_lib.teaching, name), name
        assert importlib.util.find_spec(f"course_lib.teaching.{name}") is None, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        course_lib.teaching.nothing  # noqa: B018


def test_interrupts_pass_through(notebook: Notebook) -> None:
    notebook.answer("01.1", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        check("01.1")
    assert current_session().store.read().exercises == {}


def test_a_look_that_fails_is_told(notebook: Notebook, said) -> None:
    path = catalogue.lesson("01").exercises
    path.write_text(path.read_text().replace("print(", "answer.missing("))
    notebook.answer("01.1", RIGHT)
    check("01.1")
    assert "\nA look at it inside the engine ended with AttributeError: 'function' object has no" in said()


def test_a_look_is_guarded_like_a_check(notebook: Notebook, said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.teaching.learner.session.LOOK_SECONDS", 0.2)
    notebook.run("import builtins, sys")
    own_sum = sum
    notebook.answer("01.1", f"print('x' * 10_000_000); builtins.sum = None; {RIGHT}")
    check("01.1")
    assert "01.1 · passed" in (told := said()) and len(told) < 3000
    assert sum is own_sum
    looking = "sys._getframe(1).f_code.co_filename.endswith('01_basic.py')"  # not the judge
    notebook.answer("01.1", f"while {looking}: pass\n    {RIGHT}")
    check("01.1")
    assert said().endswith("\nA look at it inside the engine was stopped after 0.2 seconds.\n")


def test_a_look_shows_its_own_lines_and_counts_what_the_answer_prints(notebook: Notebook, said) -> None:
    notebook.run("def helper(probs):\n    print('x' * 99)\n    return probs.argmax(dim=-1)")
    notebook.answer("01.1", "print('tried')\n    return helper(probs)")
    check("01.1")
    assert said() == (
        "01.1 · passed\nAll 4 cases are right.\n"
        "Note: your code printed 424 characters, which a check does not show.\n"
        "look: [1]\n"
        "Note: here your code printed 106 characters, which a check does not show.\n"
    )


def test_what_cannot_be_checked_on_this_machine(notebook: Notebook, said) -> None:
    path = catalogue.lesson("01").exercises
    needs = 'needs=("no_such_package", "Triton exists for Linux only.")'
    path.write_text(path.read_text().replace('"The likeliest", ', f'"The likeliest", {needs}, '))
    notebook.run("import no_such_package\n@exercise('01.1')\ndef pick(probs): return 1")
    check("01.1")
    assert said() == "01.1 · cannot be checked here: Triton exists for Linux only.\n"
    notebook.answer("01.1", WRONG)
    check("01.1")
    assert said() == "01.1 · cannot be checked here: Triton exists for Linux only.\n"
    progress = current_session().store.read().of("01.1")
    assert progress.is_unavailable and (progress.attempts, progress.failures) == (0, 0)
    solution("01.1", anyway=True)
    assert "argmax" in said()


def test_builtins_that_a_cell_replaced_are_put_back(notebook: Notebook, said) -> None:
    own_sum = sum
    try:
        notebook.run("import builtins\nbuiltins.sum = lambda x: 5")
        notebook.answer("01.1", RIGHT)
        check("01.1")
        assert sum is own_sum
    finally:
        vars(builtins)["sum"] = own_sum
    assert said().startswith("Your notebook had replaced Python's sum: put back.\n01.1 · passed\n")


def test_an_exercise_under_a_cell_magic(notebook: Notebook, said) -> None:
    """IPython runs such a cell from a string that is in no file, and keeps the call of its magic."""
    notebook.answer("01.1", WRONG)
    source = f'@exercise("01.1")\ndef pick(probs):\n    {RIGHT}\n'
    notebook.namespace["_ih"].append(f"get_ipython().run_cell_magic('time', '', {source!r})\n")
    exec(compile(source, "<timed exec>", "exec", dont_inherit=True), notebook.namespace)
    check("01.1")
    assert said() == "01.1 · passed\nAll 4 cases are right.\nlook: [1]\n"
    store = current_session().store
    assert store.read().of("01.1").last_source == source
    assert RIGHT in answer_path(store.work, "01.1").read_text()


KERNEL = """
import sys
from pathlib import Path
from course_lib.teaching import catalogue
catalogue.REPO_ROOT = Path({root!r})
"""
CELLS = [
    "import torch\nfrom course_lib.teaching import *\nDIM = -1",
    "class Largest:\n    def __call__(self, x):\n        return x.argmax(dim=DIM)",
    '@exercise("01.1")\ndef pick(probs):\n    return Largest()(probs)',
    'check("01.1")',
    '@exercise("01.1")\ndef pick(probs)\n    return Largest()(probs)',
    'check("01.1")',
    'predict("01.a")',
]


def test_in_a_real_kernel(notebook: Notebook, tmp_path: Path) -> None:
    """IPython's cells are found, and what passes there runs in this process."""
    import nbformat
    from nbclient import NotebookClient

    sources = [KERNEL.format(root=str(tmp_path)), *CELLS]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(book, kernel_name="python3", allow_errors=True, timeout=60).execute()
    printed = [
        "".join(output.get("text", output.get("ename", "")) for output in cell.outputs) for cell in book.cells
    ]
    [shown] = book.cells[-1].outputs
    assert sorted(shown.data) == ["application/vnd.jupyter.widget-view+json", "text/html", "text/plain"]
    passed = "01.1 · passed\nAll 4 cases are right.\n"
    stale = "The exercise's cell raised an error when it last ran: this is about the version before.\n"
    assert printed == [
        "",
        "",
        "",
        "",
        passed + "look: [1]\n",
        "SyntaxError",
        passed + stale + "look: [1]\n",
        "",
    ]
    import torch

    answer = load_answer(answer_path(tmp_path / "work", "01.1"))
    assert answer(torch.tensor([[1.0, 2.0]])).tolist() == [1]
    assert sys.modules[answer.__module__].__file__.endswith("01_1.py")
