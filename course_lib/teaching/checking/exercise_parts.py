"""The pieces of an exercise file, as plain data: cases, diagnostics, budgets, and questions to predict."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Answer = Callable[..., Any]  # a function, or a class that the exercise's `run` knows how to use


class Case:
    """One call of an answer: `answer(*args, **kwargs)`, or `run(answer, *args, **kwargs)`.

    `label` is told to the learner. `may_change` names the arguments that an answer may change in place. The
    arguments are deep-copied for every call, so what cannot be copied (an engine) is made in `run`.
    `retold` names the arguments that the learner is not shown, because the result, a list of texts, tells what
    happened line by line (events, each with its outcome); of such results the lines up to the first that differs
    are shown.
    """

    def __init__(self, label: str, /, *args: Any, may_change: Sequence[str] = (), retold: Sequence[str] = (),
                 **kwargs: Any) -> None:
        self.label = label
        self.args = args
        self.kwargs = kwargs
        self.may_change = tuple(may_change)
        self.retold = tuple(retold)


@dataclass(frozen=True)
class Failure:
    """The first case that an answer got wrong, as a symptom sees it.

    `error` is the exception that the answer ended with (`trial.TookTooLong` when it was stopped), else None;
    `got` is None after an error. `changed` names the arguments that it changed without being allowed to.
    """

    case: Case
    got: Any
    expected: Any
    error: BaseException | None = None
    changed: tuple[str, ...] = ()

    @property
    def args(self) -> tuple[Any, ...]:
        return self.case.args

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.case.kwargs


@dataclass(frozen=True)
class Diagnostic:
    """A likely mistake. `function` recognises it in a failure (symptom), or is an answer that makes it."""

    name: str
    message: str
    kind: Literal["symptom", "mistake"]
    function: Callable[..., Any]


@dataclass(frozen=True)
class Budget:
    """How much work a right answer may do: `count(answer)` is at most `most`; `unit` says of what."""

    message: str
    most: int
    unit: str
    count: Callable[[Answer], int]


@dataclass(frozen=True)
class Choice:
    """One possible reply to a `Question`, and why it is right or wrong."""

    text: str
    why: str
    right: bool = False


@dataclass(frozen=True)
class Question:
    """A prediction to make before the cell that shows the result. Ids look like "01.a"."""

    id: str
    text: str
    choices: Sequence[Choice]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        if not re.fullmatch(r"\d\d\.[a-z]", self.id):
            raise ValueError(f"question id {self.id!r} should look like '01.a'.")
        texts = [choice.text for choice in self.choices]
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise ValueError(f"question {self.id} needs at least two choices, all different.")
        if sum(choice.right for choice in self.choices) != 1:
            raise ValueError(f"question {self.id} needs exactly one choice with right=True.")

    @property
    def right(self) -> Choice:
        return next(choice for choice in self.choices if choice.right)
