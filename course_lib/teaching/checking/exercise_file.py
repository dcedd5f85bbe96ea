"""What an exercise file says: cases, the truth, the likely mistakes, hints; and questions to predict.

A file `exercises/<stage>/NN_slug.py` makes `Exercise` objects and hangs functions on them with decorators;
this module only collects them. `judging.py` judges answers with them.

Invariant: what `load_exercises` returns can be judged. Every exercise has cases and a truth, every wrong
answer names a diagnostic of its exercise, and a budget comes with a wasteful answer.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from course_lib.teaching.checking.exercise_parts import (
    Answer,
    Budget,
    Case,
    Choice,
    Diagnostic,
    Failure,
    Question,
)

__all__ = ["Case", "Choice", "Exercise", "ExerciseFile", "Failure", "Question", "load_exercises"]

SEEDS = (0, 1)  # the cases are made once with each
IMPORTANCE = ("core", "useful", "extra")
UNAVAILABLE = "cannot be checked here"  # what a check says where the exercise has an obstacle


@dataclass(eq=False)
class Exercise:
    """One exercise. Ids look like "01.2"; `target` is the engine's "module:name" that an answer can replace,
    or None; `stars` 1 to 4; `hints` lead in three steps from a nudge to nearly the code. `needs` is a package
    that not every machine has and what to say there: ("triton", "Triton exists for Linux only: read …").

    The methods of the first group are decorators for exercise files and return what they are given. What
    they collect is in the attributes; a `…_function` is None when the file has none.
    """

    id: str
    title: str
    target: str | None
    stars: int
    minutes: int
    importance: str
    hints: tuple[str, str, str]
    spec: str = ""
    needs: tuple[str, str] | None = None
    diagnostics: dict[str, Diagnostic] = field(default_factory=dict, init=False)
    wrong_answers: list[tuple[str, Answer]] = field(default_factory=list, init=False)  # (diagnostic, answer)
    accepted_answers: list[Answer] = field(default_factory=list, init=False)
    wasteful_answers: list[Answer] = field(default_factory=list, init=False)
    budgets: list[Budget] = field(default_factory=list, init=False)
    cases_function: Callable[[random.Random], Iterator[Case]] | None = field(default=None, init=False)
    expected_function: Callable[..., Any] | None = field(default=None, init=False)
    run_function: Callable[..., Any] | None = field(default=None, init=False)
    same_function: Callable[[Any, Any, Case], bool] | None = field(default=None, init=False)
    adapt_function: Callable[[Answer, Any], Any] | None = field(default=None, init=False)
    look_function: Callable[..., None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._require({
            "id should look like '01.2'": re.fullmatch(r"\d\d\.\d+", self.id),
            "target should look like 'package.module:name', or be None":
                self.target is None or re.fullmatch(r"[\w.]+:[\w.]+", self.target),
            "stars should be 1, 2, 3 or 4": self.stars in (1, 2, 3, 4),
            "minutes should be at least 1": self.minutes >= 1,
            f"importance should be one of {', '.join(IMPORTANCE)}": self.importance in IMPORTANCE,
            "hints should be three texts": len(self.hints) == 3 and all(self.hints),
            "needs should be the name of a package and a sentence, or None":
                self.needs is None or len(self.needs) == 2 and self.needs[0].isidentifier(),
        })

    # Decorators for exercise files

    def cases(self, function: Callable[[random.Random], Iterator[Case]]) -> Callable:
        """A generator of cases from a `random.Random`."""
        return self._only("cases", function)

    def expected(self, function: Callable[..., Any]) -> Callable:
        """The truth for a case's arguments, found in another way than the solution."""
        return self._only("expected", function)

    def run(self, function: Callable[..., Any]) -> Callable:
        """How an answer is used: `run(answer, *args, **kwargs)` -> something comparable."""
        return self._only("run", function)

    def same(self, function: Callable[[Any, Any, Case], bool]) -> Callable:
        """`same(got, expected, case)`, instead of the comparison of `comparing.py`."""
        return self._only("same", function)

    def adapt(self, function: Callable[[Answer, Any], Any]) -> Callable:
        """`adapt(answer, original)`: what is put in the target's place."""
        return self._only("adapt", function)

    def look(self, function: Callable[..., None]) -> Callable:
        """`look(answer)` or `look(answer, llm)`: prints a few exact facts after a pass."""
        return self._only("look", function)

    def symptom(self, name: str, message: str) -> Callable[[Callable], Callable]:
        """Tell `message` when `function(failure)` is true. A function that raises does not apply."""
        return self._diagnostic(name, message, "symptom")

    def mistake(self, name: str, message: str) -> Callable[[Answer], Answer]:
        """Tell `message` when the learner's results equal this mistaken answer's in every case."""
        return self._diagnostic(name, message, "mistake")

    def wrong(self, name: str) -> Callable[[Answer], Answer]:
        """A wrong answer that must be told diagnostic `name`. A `mistake` is one by itself."""
        def register(answer: Answer) -> Answer:
            self.wrong_answers.append((name, answer))
            return answer
        return register

    def budget(self, message: str, *, most: int, unit: str) -> Callable[[Callable], Callable]:
        """Tell `message` to a right answer for which `count(answer)` is above `most`."""
        def register(count: Callable[[Answer], int]) -> Callable[[Answer], int]:
            self.budgets.append(Budget(message, most, unit, count))
            return count
        return register

    def wasteful(self, answer: Answer) -> Answer:
        """A right answer that exceeds a budget."""
        self.wasteful_answers.append(answer)
        return answer

    def accepts(self, answer: Answer) -> Answer:
        """A right answer in another style, which must pass."""
        self.accepted_answers.append(answer)
        return answer

    # For those who use the exercise

    @property
    def obstacle(self) -> str | None:
        """Why answers cannot be judged on this machine, in a sentence; None where they can."""
        missing = self.needs is not None and importlib.util.find_spec(self.needs[0]) is None
        return self.needs[1] if missing else None

    def make_cases(self) -> list[Case]:
        """The cases of both seeds; the same ones every time."""
        cases = [case for seed in SEEDS for case in self.cases_function(random.Random(seed))]
        if not cases:
            raise ValueError(f"exercise {self.id}: @cases yields no case.")
        for case in cases:
            for option in ("may_change", "retold"):
                if unknown := set(getattr(case, option)) - set(self.argument_names(case)):
                    raise ValueError(f"exercise {self.id}, case {case.label!r}: {option} names "
                                     f"{', '.join(sorted(unknown))}, which @expected does not take.")
        return cases

    def argument_names(self, case: Case) -> tuple[str, ...]:
        """One name for each of the case's positional and then keyword arguments, as @expected calls them."""
        signature = inspect.signature(self.expected_function)
        signature.bind(*case.args, **case.kwargs)  # TypeError here rather than an odd message later
        names: list[str] = []
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                names += [f"{parameter.name}[{i}]" for i in range(len(case.args) - len(names))]
            elif len(names) < len(case.args):
                names.append(parameter.name)
        return (*names, *case.kwargs)

    def use(self, answer: Answer, /, *args: Any, **kwargs: Any) -> Any:
        """The result of an answer on a case's arguments."""
        return self.run_function(answer, *args, **kwargs) if self.run_function else answer(*args, **kwargs)

    def validate(self) -> None:
        """Raise ValueError, naming what is missing, unless answers can be judged by this exercise."""
        unknown = sorted({name for name, _ in self.wrong_answers} - set(self.diagnostics))
        self._require({
            "it has no @cases": self.cases_function,
            "it has no @expected": self.expected_function,
            f"@wrong names what is no symptom or mistake of it: {', '.join(unknown)}": not unknown,
            "a @budget needs a @wasteful answer, and the other way round":
                bool(self.budgets) == bool(self.wasteful_answers),
        })

    def shortcomings(self) -> tuple[str, ...]:
        """What a finished exercise should have and this one lacks; for the lessons' gates."""
        tried = {name for name, _ in self.wrong_answers}
        found = [f"no @wrong answer shows the symptom {name!r}"
                 for name in self.diagnostics if name not in tried]
        if len(self.wrong_answers) < 3:
            found.append(f"it has {len(self.wrong_answers)} wrong answers, and needs three")
        if not self.accepted_answers:
            found.append("it has no @accepts: a right answer in another style")
        return tuple(found)

    def _require(self, rules: dict[str, Any]) -> None:
        for sentence, kept in rules.items():
            if not kept:
                raise ValueError(f"exercise {self.id}: {sentence}.")

    def _only(self, part: str, function: Callable) -> Callable:
        if getattr(self, f"{part}_function") is not None:
            raise ValueError(f"exercise {self.id} has two functions marked @{part}.")
        setattr(self, f"{part}_function", function)
        return function

    def _diagnostic(self, name: str, message: str, kind: Literal["symptom", "mistake"]) -> Callable:
        if name in self.diagnostics:
            raise ValueError(f"exercise {self.id} has two diagnostics named {name!r}.")

        def register(function: Callable) -> Callable:
            self.diagnostics[name] = Diagnostic(name, message, kind, function)
            if kind == "mistake":
                self.wrong_answers.append((name, function))
            return function
        return register


@dataclass(frozen=True)
class ExerciseFile:
    """The exercises and questions of one lesson, by id, in the order of the file."""

    exercises: dict[str, Exercise]
    questions: dict[str, Question]


def load_exercises(path: Path) -> ExerciseFile:
    """Run the exercise file at `path`, again only when it has changed.

    Raises ValueError for an incomplete exercise, an id used twice or one of another lesson.
    """
    path = Path(path).resolve()
    return _load(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=None)
def _load(path: Path, mtime_ns: int) -> ExerciseFile:
    # Not through importlib: its bytecode cache cannot tell two edits of one second apart.
    module = ModuleType(f"exercises_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True), vars(module))

    found: dict[str, Exercise | Question] = {}
    for value in vars(module).values():
        if not isinstance(value, Exercise | Question):
            continue
        if found.setdefault(value.id, value) is not value:
            raise ValueError(f"{path.name}: the id {value.id} is used twice.")
        if re.match(r"\d\d_", path.name) and value.id[:2] != path.name[:2]:
            raise ValueError(f"{path.name}: the id {value.id} belongs to another lesson.")
        if isinstance(value, Exercise):
            value.validate()
    return ExerciseFile({i: v for i, v in found.items() if isinstance(v, Exercise)},
                        {i: v for i, v in found.items() if isinstance(v, Question)})
