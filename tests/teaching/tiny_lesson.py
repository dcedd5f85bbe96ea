"""A written lesson with real exercises on the engine, in a temporary repository, and a notebook for it."""

from __future__ import annotations

import linecache
from pathlib import Path
from textwrap import dedent
from typing import Any

from course_lib.teaching import catalogue

EXERCISES = """
import torch
from course_lib.teaching.checking.exercise_file import Case, Choice, Exercise, Question

pick = Exercise(
    "01.1", "The likeliest", target="course_lib.sampling.draw:draw", stars=1, minutes=1, importance="core",
    hints=("Which entry is largest?", "There is a tensor method.", "argmax(dim=-1)"),
)

@pick.cases
def _(rng):
    for rows in (1, 3):
        yield Case(f"{rows} rows", torch.rand(rows, 5))

@pick.expected
def _(probs):
    return torch.tensor([max(range(5), key=row.__getitem__) for row in probs.tolist()])

@pick.mistake("smallest", "You take the smallest.")
def _(probs):
    return probs.argmin(dim=-1)

@pick.adapt
def _(answer, original):
    return lambda probs, generators, default_generator: answer(probs)

@pick.look
def _(answer):
    print("look:", answer(torch.tensor([[0.1, 0.9]])).tolist())

size = Exercise(
    "01.2", "Bytes per token", target="course_lib.config:ModelConfig.kv_bytes_per_token", stars=1, minutes=1,
    importance="core", hints=("one", "two", "three"),
)

@size.cases
def _(rng):
    yield Case("two", 2)

@size.expected
def _(layers):
    return 2 * layers

@size.adapt
def _(answer, original):
    return property(lambda config: answer(config.num_layers) * original(config) // (2 * config.num_layers))

free = Exercise(
    "01.3", "Not of the engine", target=None, stars=1, minutes=1, importance="extra", hints=("a", "b", "c"),
)
free.cases(size.cases_function)
free.expected(size.expected_function)

growth = Question("01.a", "2 < 3 & more?", [
    Choice("twice", "Because of <b>."),
    Choice("four times", "It is squared.", right=True),
    Choice("never", "It does."),
])
"""

FRONT_MATTER = """\
# ---
# jupyter:
#   course:
#     lesson: "01"
#     objectives: ["do this", "do that", "say why"]
#     difficulty: 1
#     needs: []
#     opens: []
#     terms: {}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---
"""
SOLVED = {
    "01.1": "def pick(probs):\n    #: solution\n    return probs.argmax(dim=-1)\n    #: end",
    "01.2": "def size(layers):\n    #: solution\n    return 2 * layers\n    #: end",
    "01.3": "def free(layers):\n    #: solution\n    return layers + layers\n    #: end",
}


def make_lesson(repository: Path) -> None:
    """Write the files of lesson 01. The catalogue's REPO_ROOT must be `repository`."""
    lesson = catalogue.lesson("01")
    for path in (lesson.exercises, lesson.source):
        path.parent.mkdir(parents=True)
    lesson.exercises.write_text(EXERCISES)
    cells = [
        f'# %% tags=["exercise"]\n@exercise("{name}")\n{text}\n\n# %% tags=["check"]\ncheck("{name}")\n'
        for name, text in SOLVED.items()
    ]
    lesson.source.write_text(FRONT_MATTER + "\n" + "\n".join(cells))


class Notebook:
    """Runs cells as IPython does: one namespace, sources in `_ih` and in linecache, errors only kept."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.namespace["_ih"] = [""]
        self.run("from course_lib.teaching import check, exercise, hint, my_code, predict, reveal, solution")

    def run(self, source: str) -> str:
        """Run a cell; its source without indentation."""
        source = dedent(source).strip("\n")
        self.namespace["_ih"].append(source)
        name = f"<cell {id(self)} {len(self.namespace['_ih'])}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        try:
            exec(compile(source, name, "exec", dont_inherit=True), self.namespace)
        except Exception as error:
            self.error = error
        return source

    def answer(self, exercise_id: str, body: str) -> None:
        """Run an exercise's cell with another body."""
        head = SOLVED[exercise_id].partition("\n")[0]
        self.run(f'@exercise("{exercise_id}")\n{head}\n    {body}')
