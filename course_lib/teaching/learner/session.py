"""What a notebook says to the course: `exercise`, `check`, `hint`, `solution`, `course_llm`.

Owns the notebook's one session: the answers that its cells defined, and the engines made for it. Invariant: a
mistake of the learner's is told in words and raises nothing; Ctrl-C passes through.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.errors import CourseError
from course_lib.teaching import catalogue
from course_lib.teaching.checking.describing import describe_error
from course_lib.teaching.checking.exercise_file import Exercise, ExerciseFile, load_exercises
from course_lib.teaching.checking.judging import Verdict, judge
from course_lib.teaching.checking.trial import TookTooLong, attempt, put_back_builtins
from course_lib.teaching.learner.answers import answer_path, capture, cells_run, run_answer, store_answer
from course_lib.teaching.learner.home import write_home
from course_lib.teaching.learner.progress import FAILURES_TO_UNLOCK, ExerciseProgress, ProgressStore
from course_lib.teaching.learner.saying import say
from course_lib.teaching.learner.workspace import work_folder
from course_lib.teaching.lessons.lesson_source import is_stub, solution_of, stub_of

if TYPE_CHECKING:
    from course_lib import LLM

LOOK_SECONDS = 90  # for a look at a right answer, which may generate on a busy machine


@dataclass(frozen=True)
class Registered:
    """A function or class under the decorator @exercise, with the source of its cell and its globals."""

    answer: Any
    cell: str
    namespace: dict[str, Any]


class Session:
    """What one process knows of its learner: everything lasting is in `store`."""

    def __init__(self, work: Path) -> None:
        self.store = ProgressStore(work)
        self.registered: dict[str, Registered] = {}
        self.llms: dict[str, LLM] = {}
        self.serves_own_code = False  # inside `with my_code():`


@functools.cache
def current_session() -> Session:
    """The session of this process, in the folder where it was first asked for."""
    return Session(work_folder())


def find_file(identifier: str) -> tuple[catalogue.Lesson, ExerciseFile]:
    """The lesson that an exercise ("01.2") or a question ("01.a") is from. Raises CourseError if none is."""
    if not isinstance(identifier, str):
        raise CourseError('exercises and questions are named by text in quotes: "01.2", "01.a".')
    lesson = catalogue.lesson(identifier.partition(".")[0])
    if not lesson.exercises.exists():
        raise CourseError(f"lesson {lesson.number} has no exercises: it is not written yet.")
    return lesson, load_exercises(lesson.exercises)


def find_exercise(exercise_id: str) -> tuple[catalogue.Lesson, Exercise]:
    """An exercise and its lesson. Raises CourseError, naming those that there are."""
    lesson, file = find_file(exercise_id)
    if exercise_id not in file.exercises:
        raise CourseError(
            f'there is no exercise "{exercise_id}": lesson {lesson.number} has {", ".join(file.exercises)}.'
        )
    return lesson, file.exercises[exercise_id]


def told(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function` print a CourseError instead of raising it: in a notebook the sentence is enough."""

    @functools.wraps(function)
    def telling(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except CourseError as error:
            say(str(error))

    return telling


def exercise(exercise_id: str, target: str | None = None) -> Callable[[Any], Any]:
    """Decorator: this function or class is the answer to an exercise; `check` judges it.

    `target` shows the reader what the answer replaces in the engine.
    Raises CourseError for an unknown exercise, ValueError for another target than the exercise's, and
    TypeError on top of anything else than a function or class.
    """
    _put_back_builtins()
    _, known = find_exercise(exercise_id)
    if target not in (None, known.target):
        raise ValueError(f'exercise {exercise_id} has target="{known.target}": put that back.')
    frame = sys._getframe(1)  # the cell's own: works for classes too, which have no code object
    namespace = frame.f_globals
    # under a %%magic there is no file for it
    cell = "".join(linecache.getlines(frame.f_code.co_filename)) or next(reversed(cells_run(namespace)), "")

    def register(answer: Any) -> Any:
        if not callable(answer) or not getattr(answer, "__name__", "").isidentifier():  # a lambda's is not
            raise TypeError(f'@exercise("{exercise_id}") belongs on top of a function or a class.')
        current_session().registered[exercise_id] = Registered(answer, cell, namespace)
        return answer

    return register


@told
def check(exercise_id: str) -> None:
    """Judge the answer that the notebook defined, print what came of it, and record it."""
    _put_back_builtins()
    lesson, known = find_exercise(exercise_id)
    session = current_session()
    if known.obstacle:
        say(Verdict("unavailable", exercise_id, known.obstacle).text())
        _record(session, lambda store: store.record_verdict(exercise_id, "unavailable"))
        return
    registered = session.registered.get(exercise_id)
    last_run = _last_run(exercise_id)
    if registered is None:
        story = "raised an error: mend it, run it again" if last_run else "has not run yet: run it first"
        message = f'The cell with @exercise("{exercise_id}") {story}, then come back here.'
        say(Verdict("not done", exercise_id, message).text())
        return
    if is_stub(registered.cell, stub_of(lesson, exercise_id)):
        message = (
            "Write the missing part in the exercise's cell, run that cell, then run this one again. "
            f'For a nudge: hint("{exercise_id}")'
        )
        say(Verdict("not done", exercise_id, message).text())
        return
    verdict = judge(known, registered.answer)
    say(verdict.text())
    if last_run is not None and last_run.strip() != registered.cell.strip():
        say("The exercise's cell raised an error when it last ran: this is about the version before.")
    if verdict.kind == "not done":
        return
    progress = _record(
        session, lambda store: store.record_attempt(exercise_id, verdict.kind, registered.cell)
    )
    if verdict.passed:
        _keep(session, known, registered)
        _look(known, registered)
    elif progress.is_unlocked:
        say(f'solution("{exercise_id}") is open now.')
    else:
        say(f'hint("{exercise_id}") helps in three steps.')


@told
def hint(exercise_id: str) -> None:
    """Print the next hint, below those given before."""
    _, known = find_exercise(exercise_id)
    most = len(known.hints)
    given = current_session().store.record_hint(exercise_id, most).hints
    for number, text in enumerate(known.hints[:given], 1):
        say(f"Hint {number}/{most}: {text}")


@told
def solution(exercise_id: str, anyway: bool = False) -> None:
    """Print the solved cell, once it is unlocked or if you want it anyway."""
    lesson, _ = find_exercise(exercise_id)
    store = current_session().store
    if not anyway and not (progress := store.read().of(exercise_id)).is_unlocked:
        left = FAILURES_TO_UNLOCK - progress.failures
        say(
            f"The solution opens when you pass, or after {left} more failed check{'s' * (left > 1)}."
            f' You may also read it now: solution("{exercise_id}", anyway=True)'
        )
        return
    print(solution_of(lesson, exercise_id))
    store.record_solution_seen(exercise_id)


def course_llm(**engine_kwargs: Any) -> LLM:
    """The course model in an engine with these arguments (those of `LLM`); made once per kernel.

    On the CPU unless told otherwise, also where there is a GPU: exercises work with CPU tensors, and what a
    lesson says of costs is measured there.
    """
    engine_kwargs = {"device": "cpu", **engine_kwargs}
    llms, key = current_session().llms, repr(sorted(engine_kwargs.items()))
    if key not in llms:
        from course_lib import LLM

        llms[key] = LLM(**engine_kwargs)
    return llms[key]


def _put_back_builtins() -> None:
    if replaced := put_back_builtins():
        say(f"Your notebook had replaced Python's {', '.join(replaced)}: put back.")


def _last_run(exercise_id: str) -> str | None:
    """The exercise's cell as it last ran, even if it raised; None outside a notebook, too."""
    cells = cells_run(vars(sys.modules["__main__"]))
    return next((cell for cell in reversed(cells) if f'exercise("{exercise_id}"' in cell), None)


def _record(session: Session, change: Callable[[ProgressStore], ExerciseProgress]) -> ExerciseProgress:
    try:
        progress = change(session.store)
        write_home(session.store.work, session.store)
        return progress
    except (CourseError, OSError) as error:
        say(f"This attempt is not recorded: {error}")
        return ExerciseProgress()


def _keep(session: Session, known: Exercise, registered: Registered) -> None:
    """Store the answer for `my_code`, if it also passes on its own."""
    if known.target is None:
        return
    try:
        text = capture(known.id, registered.answer.__name__, registered.cell, registered.namespace)
        verdict = judge(known, run_answer(text, answer_path(session.store.work, known.id)))
        if not verdict.passed:
            raise CourseError(f"outside this notebook the same code does not pass: {verdict.message}")
        store_answer(session.store.work, known.id, text)
    except CourseError as error:
        say(f"It cannot serve in the engine yet: {error}")


def _look(known: Exercise, registered: Registered) -> None:
    look = known.look_function
    if look is None:
        return
    try:
        engine = [course_llm()] if len(inspect.signature(look).parameters) == 2 else []
    except Exception as error:
        say(f"There is no look at it inside the engine ({describe_error(error)}).")
        return
    looking = functools.partial(look, registered.answer, *engine)
    outcome = attempt(looking, (), {}, LOOK_SECONDS, apart=registered.namespace)
    if outcome.printed:
        say(outcome.output + "…" * (outcome.printed > len(outcome.output)))
    if outcome.apart:
        say(f"Note: here your code printed {outcome.apart:,} characters, which a check does not show.")
    if isinstance(outcome.error, TookTooLong):
        say(f"A look at it inside the engine was stopped after {LOOK_SECONDS} seconds.")
    elif outcome.error:
        say(f"A look at it inside the engine ended with {describe_error(outcome.error)}")
