"""The learner's code inside the engine: `with my_code():` and `with patched(exercise, answer):`.

Owns the replacement of an exercise's target, "module:function" or "module:Class.attribute". Invariant: when a
block is left, however it is left, every attribute of every module and class is the very object that it was.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any, TextIO

from course_lib.errors import CourseError
from course_lib.teaching.catalogue import lessons
from course_lib.teaching.checking.exercise_file import Exercise, load_exercises
from course_lib.teaching.learner.answers import answer_path, load_answer
from course_lib.teaching.learner.session import Session, current_session

KERNELS = "kernels.triton."  # where the targets are that only an engine on a GPU calls


@dataclass(frozen=True)
class Place:
    """Where a target is: attribute `name` of a module or class, and what stands there (`raw`)."""

    owner: Any
    name: str
    raw: Any

    @classmethod
    def of(cls, target: str) -> Place:
        """Raises ImportError if there is no such module here, ValueError if nothing in it can be replaced."""
        module, _, path = target.partition(":")
        *outer, name = path.split(".")
        owner = functools.reduce(lambda thing, part: getattr(thing, part, None), outer, import_module(module))
        raw = getattr(owner, "__dict__", {}).get(name)
        if not isinstance(_function_in(raw), FunctionType | type):
            raise ValueError(f"target {target!r} is no function, method, property or class defined there.")
        return cls(owner, name, raw)


class Patches:
    """Replacements that are in force."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, place: Place, new: Any) -> None:
        """Put `new` in the place; for a module's attribute, also wherever the engine imported it by name."""
        owner, name, raw = place.owner, place.name, place.raw

        def put_back() -> None:
            if isinstance(owner, ModuleType):
                _swap(new, raw)
            elif raw is not None:
                setattr(owner, name, raw)
            elif name in vars(owner):
                delattr(owner, name)

        self._undo.append(put_back)  # first, so that no interrupt comes between
        if isinstance(owner, ModuleType):
            _swap(raw, new)
        else:
            setattr(owner, name, new)

    def undo(self) -> None:
        """Take all replacements back; a Ctrl-C meanwhile waits."""
        interrupt = None
        while self._undo:
            try:
                self._undo[-1]()
                self._undo.pop()
            except KeyboardInterrupt as raised:
                interrupt = raised  # each step can be repeated: the one it hit is
        if interrupt:
            raise interrupt


@contextmanager
def patched(exercise: Exercise, answer: Any) -> Iterator[None]:
    """Inside the block, the engine runs `answer` in the place of the exercise's target."""
    patches = Patches()
    try:
        place = Place.of(exercise.target)
        patches.put(place, _like(place.raw, _adapted(exercise, place, answer)))
        yield
    finally:
        patches.undo()


@dataclass(frozen=True)
class Served:
    """A target and who serves it. A counter's next value is the number of calls so far."""

    exercise_id: str
    target: str
    calls: Iterator[int]  # of the target
    own_calls: Iterator[int] | None  # of your code in it, which what adapts it may not need; None: the course's

    @property
    def is_yours(self) -> bool:
        return self.own_calls is not None


@contextmanager
def my_code(file: TextIO | None = None) -> Iterator[None]:
    """Inside the block, the engine runs your stored answers; afterwards it says to `file` (standard output)
    whose code was called.

    A class counts when it is instantiated: objects made before the block stay what they were. Of two answers
    to one target, the later lesson's serves. Raises RuntimeError inside another such block.
    """
    session = current_session()
    if session.serves_own_code:
        raise RuntimeError("you are inside a `with my_code():` block: your code is running already.")
    patches, served = Patches(), None
    session.serves_own_code = True
    try:
        served = _install(session, patches, file)
        yield
    finally:
        session.serves_own_code = False
        patches.undo()
        if served is not None:
            print(_badge(served), file=file)


def _install(session: Session, patches: Patches, file: TextIO | None) -> list[Served]:
    """Put every passed answer in its place, and count the calls of every target there is."""
    exercises = [
        exercise
        for lesson in lessons()
        if lesson.exercises.exists()
        for exercise in load_exercises(lesson.exercises).exercises.values()
        if exercise.target is not None
    ]
    progress, answers = session.store.read(), {}
    for exercise in exercises:
        if progress.of(exercise.id).passed:
            try:
                answers[exercise.target] = exercise, load_answer(answer_path(session.store.work, exercise.id))
            except CourseError as error:
                print(f"{exercise.id}: the course's own code serves. {error}", file=file)
    served = []
    for target, course_exercise in {exercise.target: exercise for exercise in exercises}.items():
        try:
            place = Place.of(target)
        except ImportError:
            continue  # needs a package that is not there: nothing here can call it
        function, exercise, own_calls = _function_in(place.raw), course_exercise, None
        if target in answers:
            exercise, answer = answers[target]
            own_calls, answer = _counted(answer, patches)
            function = _adapted(exercise, place, answer)
        served.append(Served(exercise.id, target, _put_counted(patches, place, function), own_calls))
    return served


def _counted(function: Any, patches: Patches) -> tuple[Iterator[int], Any]:
    """A counter of the calls of a function, or of a class's instances, and what to use in its place."""
    calls = itertools.count()
    inner = function.__init__ if isinstance(function, type) else function

    @functools.wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        return inner(*args, **kwargs)

    if isinstance(function, type):
        patches.put(Place(function, "__init__", vars(function).get("__init__")), counted)
        return calls, function
    return calls, counted


def _put_counted(patches: Patches, place: Place, function: Any) -> Iterator[int]:
    calls, counted = _counted(function, patches)
    patches.put(place, counted if isinstance(function, type) else _like(place.raw, counted))
    return calls


def _badge(served: list[Served]) -> str:
    """How many of the targets were called, and whose code stood in them; below, yours one by one."""
    called = [(one, count) for one in served if (count := next(one.calls))]
    ran = {one.exercise_id for one in served if one.is_yours and next(one.own_calls)}
    yours = sorted((one.exercise_id, one.target, count) for one, count in called if one.exercise_id in ran)
    names = {name for name, _, _ in yours}
    idle = sorted(f"{one.exercise_id}{_when_called(one)}" for one in served
                  if one.is_yours and one.exercise_id not in names)
    width = max((len(target) for _, target, _ in yours), default=0)
    shares = f"{len(called)}: your code ran in {len(yours)}, the course's in {len(called) - len(yours)}"
    lines = [f"Of the parts you can replace, this run called {shares if called else 'none'}."]
    lines += [
        f"  {name}  {target:<{width}}  {count:,} call{'s' * (count > 1)}" for name, target, count in yours
    ]
    if idle:
        lines.append(f"  yours, but not called: {', '.join(idle)}")
    return "\n".join(lines)


def _when_called(one: Served) -> str:
    """What tells why a run on a CPU does not call it, where that is the reason."""
    return " (a Triton kernel: the engine runs those on a GPU)" if one.target.startswith(KERNELS) else ""


def _adapted(exercise: Exercise, place: Place, answer: Any) -> Any:
    adapt = exercise.adapt_function
    return _function_in(adapt(answer, _function_in(place.raw)) if adapt else answer)


def _function_in(raw: Any) -> Any:
    """The function inside a method of any kind."""
    return raw.fget if isinstance(raw, property) else getattr(raw, "__func__", raw)


def _like(raw: Any, function: Any) -> Any:
    """`function` as a method of the kind that `raw` is."""
    if isinstance(raw, property):
        return property(function, raw.fset, raw.fdel, raw.__doc__)
    return type(raw)(function) if isinstance(raw, staticmethod | classmethod) else function


def _swap(old: Any, new: Any) -> None:
    """In every loaded module of the engine, put `new` wherever `old` is."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("course_lib", "kernels") and isinstance(module, ModuleType):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
