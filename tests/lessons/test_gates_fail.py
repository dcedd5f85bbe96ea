"""Every gate can fail: the miniature lesson passes all seven, and broken in one way it fails one of them."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable

import nbformat
import pytest

from course_lib.teaching.building import budgets, gates
from course_lib.teaching.building.builder import VERSION, build, notebook_path
from course_lib.teaching.catalogue import lesson as lesson_of_course
from course_lib.teaching.lessons import nbval_run
from tests.lessons.miniature import EXERCISES, Miniature

Notebook = nbformat.NotebookNode


def fails(problems: list[str], *said: str) -> None:
    """There are problems, and together they say this."""
    assert problems
    for part in said:
        assert part in "\n".join(problems)


def edit(lesson: Miniature, edition: str, change: Callable[[Notebook], None]) -> None:
    """Change a stored notebook by hand, which nobody should."""
    path = notebook_path(lesson, edition)
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def cell_of(notebook: Notebook, source_part: str) -> Notebook:
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and source_part in cell.source]
    return cell


def well_formed(lesson: Miniature) -> list[str]:
    return budgets.is_well_formed(lesson, [lesson_of_course("01"), lesson, lesson_of_course("03")])


def test_the_miniature_passes(built: Miniature) -> None:
    for gate in (gates.same_cells, gates.stubs_fail, gates.answers_are_judged, gates.solutions_hidden):
        assert gate(built) == []
    assert well_formed(built) == []


@pytest.mark.slow
def test_the_miniature_runs(built: Miniature) -> None:
    assert gates.solved_runs(built) == [] and gates.learner_runs(built) == []


def test_what_cannot_be_read(miniature: Miniature) -> None:
    reading = (gates.same_cells, gates.stubs_fail, gates.solutions_hidden, well_formed)
    for gate in (*reading, gates.solved_runs, gates.learner_runs):
        fails(gate(miniature), "cannot be read (FileNotFoundError): `python3 -m course_lib build 02`")
    build(miniature, execute=False)
    for path in (miniature.notebook, miniature.solution_notebook):
        path.write_text('{"cells": [')
    for gate in (*reading, gates.solved_runs, gates.learner_runs):
        fails(gate(miniature), "cannot be read (NotJSONError)")
    miniature.source.write_text("# %%\n")
    for gate in reading:
        fails(gate(miniature), "line 1: a lesson begins with its front matter")


def test_what_cannot_be_checked_here_neither_passes_nor_fails(
    built: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_nbval(notebook, environment):
        cells = gates.code_cells(gates.stored_notebook(built, "solved"))
        said = {"check-02-1": "02.1 · cannot be checked here: there is no Triton.\n", "check-02-2": "02.2 · wrong\n"}
        failing = {*said, "ex-02-1", "ex-02-2"}
        return {number: nbval_run.CellReport(cell.id not in failing, said.get(cell.id, ""), "fails")
                for number, cell in enumerate(cells)}  # fmt: skip

    monkeypatch.setattr(gates, "run_nbval", run_nbval)
    for gate in (gates.solved_runs, gates.learner_runs):
        problems = gate(built)
        assert len(problems) == 2
        fails(problems, "(ex-02-2): fails", "(check-02-2): fails")

    text = built.exercises.read_text().replace("accepts(lambda x: right(x))", "accepts(lambda x: right(x) + 1)")
    built.exercises.write_text(text)
    fails(gates.answers_are_judged(built), "should pass, but would be told 'one-more'")
    needing = 'hints=HINTS, needs=("no_such_package", "Linux only.")'
    built.exercises.write_text(text.replace("hints=HINTS", needing))
    assert gates.answers_are_judged(built) == []


# 1 same cells


@pytest.mark.parametrize("path", ["source", "exercises"])
def test_1_source_changed(built: Miniature, path: str) -> None:
    file = getattr(built, path)
    file.write_text(file.read_text() + "\n# a comment\n")
    fails(gates.same_cells(built), "made from another source")


def test_1_builder_changed(built: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.teaching.building.builder.VERSION", VERSION + 1)
    fails(gates.same_cells(built), "made from another source")


def _remove_a_cell(notebook: Notebook) -> None:
    del notebook.cells[3]


def _edit_a_cell(notebook: Notebook) -> None:
    cell_of(notebook, "sorted(").source = "print([1, 2, 3])"


def _drop_a_tag(notebook: Notebook) -> None:
    cell_of(notebook, "sorted(").metadata.tags.pop()


def _clear(notebook: Notebook) -> None:
    cell_of(notebook, "sorted(").execution_count = None


def _store_an_error(notebook: Notebook) -> None:
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])
    cell_of(notebook, "sorted(").outputs = [error]


def _store_a_widget(notebook: Notebook) -> None:
    data = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "x"}
    cell_of(notebook, "sorted(").outputs = [nbformat.v4.new_output("display_data", data=data)]


def _store_a_path(notebook: Notebook) -> None:
    text = f"{os.path.dirname(gates.__file__)}/x.py:3: UserWarning"
    cell_of(notebook, "sorted(").outputs = [nbformat.v4.new_output("stream", text=text)]


@pytest.mark.parametrize("edition", ["learner", "solved"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_remove_a_cell, "its cells are not those of the source"),
        (_edit_a_cell, "is not what the source gives"),
        (_drop_a_tag, "is not what the source gives"),
        (_clear, "it was not run from top to bottom"),
        (_store_an_error, "stores an error"),
        (_store_a_widget, "stores a widget"),
        (_store_a_path, "prints a path of this machine"),
    ],
)
def test_1_notebook_changed(built: Miniature, change: Callable, said: str, edition: str) -> None:
    edit(built, edition, change)
    fails(gates.same_cells(built), said, f"{edition} edition")


def test_1_jupytext_reads_something_else(built: Miniature) -> None:
    built.rewrite("print(sorted(", "# %matplotlib inline\nprint(sorted(")
    fails(gates.same_cells(built), "jupytext reads cell code-")


# 2 and 6: running


@pytest.mark.slow
def test_6_failing_cells(built: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbval_run, "CELL_TIMEOUT_S", 2)

    def change(notebook: Notebook) -> None:
        cell_of(notebook, 'predict("02.a")').metadata.tags = ["nbval-skip"]
        cell_of(notebook, "display(Image").source = "def f():\n    raise ValueError('on purpose')\n\n\nf()"
        cell_of(notebook, "sorted(").outputs[0].text = "[1, 2, 4]\n"
        cell_of(notebook, 'check("02.1")').outputs[0].text = "02.1 · passed\n"
        cell_of(notebook, "def square(").source = "while True:\n    pass"

    edit(built, "learner", change)
    problems = gates.learner_runs(built)
    beginnings = [problem.partition(":")[0] for problem in problems]
    assert beginnings[0].startswith("learner edition, cell 2 (code-")
    assert beginnings[1].startswith("learner edition, cell 4 (code-")
    assert beginnings[2].startswith("learner edition, cell 5 (code-")
    assert beginnings[3:5] == ["learner edition, cell 7 (check-02-1)", "learner edition, cell 8 (ex-02-2)"]
    assert "raise ValueError('on purpose')" in problems[1] and "----> 5 f()" in problems[1]
    assert "[1, 2, 4]" in problems[2] and "[1, 2, 3]" in problems[2]
    assert "02.1 · not done yet" in problems[3] and "Timeout of 2 seconds" in problems[4]
    # a cell that was stopped fails what needs it, and nothing else
    assert len(problems) == 6 and problems[5].startswith("learner edition, cell 9 (check-02-2)")


@pytest.mark.slow
def test_2_dying_kernel(built: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbval_run, "CELL_TIMEOUT_S", 1)

    def change(notebook: Notebook) -> None:
        cell_of(notebook, "def same(").source = "import os\n\nos._exit(1)"

    edit(built, "solved", change)
    problems = gates.solved_runs(built)
    assert len(problems) == 2
    fails(problems, "solved edition, cell 10 (ex-02-3)", "solved edition, cell 11 (check-02-3)")


def test_2_solved_edition_that_does_not_pass(built: Miniature, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "run_edition", lambda lesson, edition: [])  # shown above
    assert gates.solved_runs(built) == []

    def change(notebook: Notebook) -> None:
        cell_of(notebook, 'check("02.1")').outputs[0].text = "02.1 · not right yet\n"
        cell_of(notebook, 'check("02.2")').outputs = []

    edit(built, "solved", change)
    fails(gates.solved_runs(built), 'check("02.1") should say "passed"', 'check("02.2") should say "passed"')


# 3 stubs


def test_3_stub_that_passes(miniature: Miniature) -> None:
    miniature.rewrite("squared = None", "squared = x + x + x")
    build(miniature)
    fails(gates.stubs_fail(miniature), 'check("02.2") should say "not done yet"; it says: 02.2 · passed')


def test_3_stub_that_is_the_solution(built: Miniature) -> None:
    built.rewrite("    squared = None\n    return squared", "    return (x * x)  # the same")
    fails(gates.stubs_fail(built), "the stub of 02.2 is its solution")


def test_3_check_that_is_missing(built: Miniature) -> None:
    def change(notebook: Notebook) -> None:
        notebook.cells = [cell for cell in notebook.cells if cell.id != "check-02-3"]

    edit(built, "learner", change)
    fails(gates.stubs_fail(built), "there is no such cell")


# 4 answers


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("lambda x: right(x) - 1)", "lambda x: right(x) + 1)", "'one-less', but would be told 'one-more'"),
        ("lambda x: right(x) - 1)", "lambda x: right(x))", "should be told 'one-less', but would pass"),
        ("lambda x: str(right(x)))", "lambda x: right(x) * 7 + 3)", "be told 'text', but would be told None"),
        ("made.accepts(lambda x: right(x))", "made.accepts(lambda x: 7)", "pass, but would be told None"),
        ("return len(range(x))", "return x", "should be told of too much work, but would pass"),
        ("made.accepts(lambda x: right(x))", "", "02.1: it has no @accepts"),
        ('made.wrong("text")(lambda x: str(right(x)))', "", "no @wrong answer shows the symptom 'text'"),
        ("made.expected(lambda x: right(x))", "", "it has no @expected"),
    ],
)
def test_4_answers(miniature: Miniature, old: str, new: str, said: str) -> None:
    miniature.rewrite(old, new, miniature.exercises)
    fails(gates.answers_are_judged(miniature), said)


# 5 solutions


@pytest.mark.parametrize("line", ["twice = 2 * x  # secret", "return x * x"])
def test_5_solution_in_a_cell_or_an_output(built: Miniature, line: str) -> None:
    def show_in_cell(notebook: Notebook) -> None:
        cell_of(notebook, "sorted(").source += f"\nif False:\n        {line}\n"

    def show_in_output(notebook: Notebook) -> None:
        cell_of(notebook, "sorted(").outputs[0].text += f"  {line}\n"

    before = built.notebook.read_text()
    for show in (show_in_cell, show_in_output):
        edit(built, "learner", show)
        fails(gates.solutions_hidden(built), f"shows a line of a solution: {line}")
        built.notebook.write_text(before)


def test_5_solution_in_the_prose(built: Miniature) -> None:
    built.rewrite("# ## The idea", "# ```\n# return x * x\n# ```")
    build(built, execute=False)
    fails(gates.solutions_hidden(built), "shows a line of a solution: return x * x")


def test_5_a_line_that_the_source_has_elsewhere_is_no_secret(built: Miniature) -> None:
    built.rewrite("print(sorted([3, 1, 2]))", "def area(x):\n    return x * x")
    build(built, execute=False)
    assert gates.solutions_hidden(built) == []


# 7 well formed

LONG = "\n".join(f"x{n} = {n}" for n in range(41))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"Double", "Square", "Sort"', '"Double"', "it has 1 objectives; there should be 3 to 5"),
        ("difficulty: 2", "difficulty: 5", "it has 5 stars of difficulty"),
        ('needs: ["01"]', 'needs: ["03"]', "it needs lesson 03, which does not come before it"),
        ('needs: ["01"]', 'needs: ["02"]', "it needs lesson 02"),
        ('errors.py"]', 'error.py"]', "it opens course_lib/error.py, which does not exist"),
        ('"Twice as much."', '""', "the term 'double' has no definition"),
        ("word " * 1500, "word " * 1400, "words of prose; there should be 1500 to 2800"),
        ("word " * 1500, "word " * 2800, "words of prose; there should be 1500 to 2800"),
        ("Read [", "Simply read [", "leave out 'Simply'"),
        ('"Square", ', '"Easily square", ', "leave out 'Easily'"),
        ("course_lib/errors.py),", "course_lib/error.py),", "../../course_lib/error.py leads nowhere"),
        ("../../course_lib/errors.py),", "/etc/hostname),", "/etc/hostname leads nowhere"),
        ("(#The-idea)", "(#the-idea)", "#the-idea leads to no heading"),
        ("print(sorted([3, 1, 2]))", LONG, "has 41 lines; 40 is the most"),
        ("    twice = 2 * x", "    y = 1\n" * 60 + "    twice = 2 * x", "60 is the most"),
        ("course_lib.errors:CourseError", "course_lib.errors:SetupError", "02.1: its cell has target"),
        ('predict("02.a")', "pass", 'question 02.a needs a cell with predict("02.a")'),
        ('reveal("02.a")', "pass", 'question 02.a needs a cell with reveal("02.a")'),
        ("Read [", "As in exercise 03.2, read [", "mentions 03.2, which comes in a later lesson"),
        ("print(sorted([3, 1, 2]))", 'hint("02.7")', "mentions 02.7, which the exercise file does not have"),
    ],
)  # fmt: skip
def test_7_source(built: Miniature, old: str, new: str, said: str) -> None:
    built.rewrite(old, new)
    fails(well_formed(built), said)


def test_7_many_long_cells(built: Miniature) -> None:
    built.rewrite("\n# %% tags=[\"exact\"]", f"\n# %%\n{LONG[:200]}\n" * 20 + "\n# %% tags=[\"exact\"]")
    fails(well_formed(built), "half of its code cells have more than 8 lines")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('make("02.1", 1,', 'make("02.1", 3,', "its last exercise should have the most stars"),
        ('"02.3", 2', '"02.4", 2', "'02.3'], its exercise file ['02.1', '02.2', '02.4']"),
        ('made.mistake("one-less", "One too few.")', "(lambda answer: 0)", "has 2 diagnostics and needs 3"),
        ("question = ", "def unused(): ", "it has no Question to predict"),
        ('"One too few."', '"You just forgot one."', "leave out 'just'"),
        ('"too few"', '"obviously too few"', "leave out 'obviously'"),
    ],
)
def test_7_exercises(built: Miniature, old: str, new: str, said: str) -> None:
    built.rewrite(old, new, built.exercises)
    fails(well_formed(built), said)


def test_7_number_of_exercises(built: Miniature) -> None:
    more = "".join(f'\ne{n} = make("02.{n}", 4, lambda x: x)' for n in range(4, 7))
    built.exercises.write_text(EXERCISES + more)
    fails(well_formed(built), "it has 6 exercises; there should be 3 to 5")


def test_7_term_defined_before(built: Miniature, tmp_path) -> None:
    from dataclasses import replace

    earlier = replace(built, number="01", slug="basic")
    earlier.source.write_text(built.source.read_text().replace("02", "01").replace('"double"', '"Double"'))
    problems = budgets.is_well_formed(built, [earlier, built])
    fails(problems, "the term 'Double' is defined in lesson 01 already")


def test_7_figures_and_files(built: Miniature) -> None:
    def grow(notebook: Notebook) -> None:
        outputs = cell_of(notebook, "display(Image").outputs
        outputs[0].data["image/png"] = base64.b64encode(b"\0" * (40 * 1024 + 1)).decode()
        outputs.pop()
        cell_of(notebook, "sorted(").outputs[0].text = "long " * 50_000

    edit(built, "learner", grow)
    fails(
        well_formed(built),
        "learner edition: it has 2 figures; there should be 3 to 6",
        "has 40.0 KB; 40 is the most",
        "KB; 230 is the most",
    )


def test_words_are_counted_in_prose_only() -> None:
    text = "Two words.\n\n```python\nx = 1\n```\n\n$$a + b$$ `code here` [a link](https://example.org/just)"
    assert budgets.count_words(text) == 4
