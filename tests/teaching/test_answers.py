"""Answers taken out of a notebook: what is brought along, what is refused, and that they run elsewhere."""

from __future__ import annotations

import linecache
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from course_lib.errors import CourseError
from course_lib.teaching.learner.answers import capture, load_answer, run_answer, store_answer, stored_answers


class Notebook:
    """Runs cells as IPython does: one namespace, sources kept in `_ih` and in linecache."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {
            "__name__": "__main__",
            "_ih": [""],
            "exercise": lambda *_, **__: lambda x: x,
        }

    def run(self, source: str) -> str:
        source = dedent(source).strip("\n")
        cells = self.namespace["_ih"]
        cells.append(source)
        name = f"<cell {id(self)} {len(cells)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec", dont_inherit=True), self.namespace)
        return source

    def capture(self, name: str, cell: str) -> str:
        return capture("01.1", name, self.run(cell), self.namespace)


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


def test_a_function_comes_with_its_comments_and_without_the_course_decorator(notebook: Notebook) -> None:
    text = notebook.capture("double", '''
        @exercise("01.1", target="a:b")
        def double(x):
            """Twice."""
            return 2 * x  # really
        print("a demonstration is not part of the answer", end="")
    ''')  # fmt: skip
    assert text == (
        "# Your answer to exercise 01.1, as it passed. Passing again replaces this file.\n\n"
        "from __future__ import annotations\n\n"
        "def double(x):\n"
        '    """Twice."""\n'
        "    return 2 * x  # really\n\n"
        "__answer__ = double\n"
    )


def test_what_it_uses_comes_along_wherever_it_was_defined(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("""
        import math, os.path as paths
        from collections import defaultdict as groups, OrderedDict
        from math import *
        SCALE, WIDTH = 3, 4
        LIMITS = {"low": float("-inf"), "names": ("a", ["b", {1}, {}, ()], None), "odd": float("nan")}
    """)
    notebook.run("""
        def helper(x):
            return other(x) * SCALE

        def other(x):
            return helper(x - 1) if x > 9 else math.sqrt(x)  # they call each other

        plus = lambda x: x + WIDTH

        class Base:
            unit = 1

        Unknown = object()
    """)
    text = notebook.capture("Answer", """
        from dataclasses import dataclass
        if SCALE > 2:
            BIG = True
        else:
            BIG = False

        @dataclass
        class Pair:
            left: int
            right: Unknown = WIDTH  # an annotation is never looked up

        @exercise("01.1")
        class Answer(Base):
            names = LIMITS["names"]
            first = names[0]

            def __call__(self, x, width=WIDTH):
                kinds = groups(int)
                kinds["a"] += Pair(1).right + self.unit + BIG
                name = paths.join("a", "b")
                return plus(helper(x)) + kinds["a"] + floor(0.5) + len(name), self.first, LIMITS["low"]
    """)  # fmt: skip
    expected = notebook.namespace["Answer"]()(4)
    assert (
        run_answer(text, tmp_path / "01_1.py")()(4)
        == expected
        == (6 + 4 + 4 + 1 + 1 + 0 + 3, "a", float("-inf"))
    )
    assert "from collections import defaultdict as groups" in text and "plus = lambda" in text
    assert text.count("import floor") == 1  # by `import *`


def test_an_answer_runs_in_another_process(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("import functools\nBASE = 10")
    text = notebook.capture("digits", """
        @exercise("01.1")
        @functools.lru_cache
        def digits(n):
            return [n] if n < BASE else digits(n // BASE) + [n % BASE]
    """)  # fmt: skip
    store_answer(tmp_path, "01.1", text)
    path = stored_answers(tmp_path)["01.1"]
    script = "import sys, pathlib; from course_lib.teaching.learner.answers import load_answer as load; "
    script += "print(load(pathlib.Path(sys.argv[1]))(1234))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[1, 2, 3, 4]\n"


def test_the_newest_definition_counts_and_the_exercise_cell_first(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("def helper(): return 'old'\ndef mine(): return 'elsewhere'")
    notebook.run("def helper(): return 'new'")
    notebook.namespace["_ih"] += [
        "def helper(:  # a cell that never ran",
        "def helper(): pass\nreturn helper",
    ]
    text = notebook.capture("answer", """
        def mine(): return 'here'
        def answer(): return helper(), mine()
    """)  # fmt: skip
    assert run_answer(text, tmp_path / "a.py")() == ("new", "here")


def test_a_helper_is_the_one_that_the_notebook_has(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("def helper(): return 'right'")
    notebook.namespace["_ih"].append("1 / 0\ndef helper(): return 'never defined'")
    text = notebook.capture("answer", "def answer(): return helper()")
    assert run_answer(text, tmp_path / "a.py")() == "right"


def test_a_global_that_a_function_assigns_comes_along(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("calls = 0")
    text = notebook.capture("answer", """
        def answer():
            global calls
            calls += 1
            return calls
    """)  # fmt: skip
    answer = run_answer(text, tmp_path / "a.py")
    assert (answer(), answer()) == (1, 2)


def test_local_names_are_not_looked_for(notebook: Notebook) -> None:
    notebook.run("class Live: pass\nx = row = Live()\nmax = 3")
    text = notebook.capture("answer", """
        def answer(rows):
            total = 0
            for row in rows:
                total += sum(x for x in row)
            return total.max() if hasattr(total, "max") else total
    """)  # fmt: skip
    assert "Live" not in text and "max = 3" not in text


def test_a_global_that_does_not_exist_is_left_to_python(notebook: Notebook, tmp_path: Path) -> None:
    text = notebook.capture("answer", "def answer(x):\n    return missing if x else 0")
    answer = run_answer(text, tmp_path / "a.py")
    assert answer(0) == 0
    with pytest.raises(NameError):
        answer(1)


@pytest.mark.parametrize("value", ["Live()", "[Live()]", "{1: Live()}", "print.__str__", "[0] * 10_000"])
def test_a_live_object_of_another_cell_is_refused_by_name(notebook: Notebook, value: str) -> None:
    notebook.run(f"class Live: pass\nllm = {value}")
    with pytest.raises(
        CourseError, match=r"uses `llm` \([\w-]+\), which exists in this notebook only: make it an argum"
    ):
        notebook.capture("answer", "def answer():\n    return llm")


def test_the_same_object_defined_in_the_exercise_cell_comes_along(notebook: Notebook, tmp_path: Path) -> None:
    text = notebook.capture("answer", """
        class Live: value = 7
        live = Live()
        def answer(): return live.value
    """)  # fmt: skip
    assert run_answer(text, tmp_path / "a.py")() == 7


def test_torch_names(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("""
        import torch
        import torch.nn.functional as F
        from torch import Tensor, topk
        KIND, WHERE = torch.float16, torch.device("cpu")
    """)
    text = notebook.capture("answer", """
        @torch.no_grad()
        def answer(x: Tensor) -> Tensor:
            return F.relu(topk(x, 2).values.to(WHERE, KIND))
    """)  # fmt: skip
    import torch

    got = run_answer(text, tmp_path / "a.py")(torch.tensor([-3.0, -1.0, 2.0]))
    assert got.tolist() == [2.0, 0.0] and got.dtype == torch.float16


def test_tools_that_read_source_find_it(notebook: Notebook, tmp_path: Path) -> None:
    notebook.run("import inspect\ndef jit(function): return lambda: inspect.getsource(function)")
    text = notebook.capture("answer", '@exercise("01.1")\n@jit\ndef answer():\n    return 1  # one')
    assert run_answer(text, tmp_path / "a.py")() == "@jit\ndef answer():\n    return 1  # one\n"


def test_stored_answers_are_found_replaced_at_once_and_load_anew(tmp_path: Path) -> None:
    assert stored_answers(tmp_path) == {}
    for value in (1, 2):  # same length, same second
        store_answer(tmp_path, "01.10", f"__answer__ = {value}\n")
        [(name, path)] = stored_answers(tmp_path).items()
        assert (name, load_answer(path)) == ("01.10", value)


@pytest.mark.parametrize("text", ["def half(", "import no_such_module", "x = 1", "1 / 0"])
def test_a_stored_answer_that_does_not_run_says_what_to_do(tmp_path: Path, text: str) -> None:
    store_answer(tmp_path, "01.1", text)
    with pytest.raises(CourseError, match=r"01_1.py does not run by itself \(.*check its exercise again"):
        load_answer(stored_answers(tmp_path)["01.1"])


def test_a_stored_answer_that_is_gone_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="missing or unreadable: check its exercise again"):
        load_answer(tmp_path / "answers" / "01_1.py")


def test_answers_that_cannot_be_stored(tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("in the way")
    with pytest.raises(CourseError, match=r"01_1\.py cannot be written"):
        store_answer(tmp_path, "01.1", "")
