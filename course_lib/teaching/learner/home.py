"""Where the learner stands: the home page that `lab` opens, and the same for the terminal.

Owns the words; what is passed is the progress store's, which lessons there are is the catalogue's. Standard
library only: `progress` works before the set-up, and the page is written anew after every check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from course_lib.teaching.catalogue import STAGES, Lesson, lessons
from course_lib.teaching.checking.exercise_file import UNAVAILABLE
from course_lib.teaching.learner.progress import Progress, ProgressStore
from course_lib.teaching.notebook_files import DamagedNotebookError, exercise_ids, read_notebook, write_text

HOME = "HOME.md"


@dataclass(frozen=True)
class Standing:
    """How far the learner is in one lesson."""

    lesson: Lesson
    exercises: tuple[str, ...]
    passed: tuple[str, ...]
    slipped: tuple[str, ...]  # of those passed: failed when checked last
    unavailable: tuple[str, ...]  # cannot be checked on this machine

    @property
    def next_exercise(self) -> str | None:
        done = {*self.passed, *self.unavailable}
        return next((exercise for exercise in self.exercises if exercise not in done), None)

    @property
    def done(self) -> str:
        if not self.lesson.is_written:
            return "not written yet"
        mark = "✓ " if self.exercises and not self.next_exercise else ""
        remarks = {"passed earlier, failed when checked last": self.slipped, UNAVAILABLE: self.unavailable}
        told = [f"; {remark}: {', '.join(names)}" for remark, names in remarks.items() if names]
        return f"{mark}{len(self.passed)} of {len(self.exercises)} exercises{''.join(told)}"


def standings(progress: Progress, of: Iterable[Lesson]) -> list[Standing]:
    """One for each lesson, in the order given."""
    result = []
    for lesson in of:
        exercises = exercises_of(lesson)
        known = {name: progress.of(name) for name in exercises}
        passed = tuple(name for name, one in known.items() if one.passed)
        slipped = tuple(name for name, one in known.items() if one.has_slipped)
        unavailable = tuple(name for name, one in known.items() if one.is_unavailable)
        result.append(Standing(lesson, exercises, passed, slipped, unavailable))
    return result


def exercises_of(lesson: Lesson) -> tuple[str, ...]:
    """The lesson's exercises as its notebook has them; none while there is no notebook."""
    try:
        return _exercises(lesson.notebook, lesson.notebook.stat().st_mtime_ns)
    except (OSError, DamagedNotebookError):
        return ()


@lru_cache
def _exercises(notebook: Path, modified_ns: int) -> tuple[str, ...]:
    return exercise_ids(read_notebook(notebook))


def home_page(progress: Progress, of: Iterable[Lesson]) -> str:
    """The home page, in Markdown; its links are relative to the work folder."""
    where = standings(progress, of)
    lines = ["# Build an inference engine, piece by piece", "", _summary(where), ""]
    if (standing := _next(where)) is not None:
        lesson = standing.lesson
        lines += [
            f"**Next: [{lesson.number} {lesson.title}]({_link(lesson)}), exercise {standing.next_exercise}.**"
            f" The whole lesson takes {lesson.minutes} minutes.",
            "",
        ]
    lines += [
        "New here? [Welcome](welcome.ipynb) is lesson 0: ten minutes with the engine that you will build.",
        "",
    ]
    for stage, title in STAGES.items():
        lines += [f"## {title}", "", "| | lesson | minutes | you build | done |", "|:--|:--|--:|:--|:--|"]
        for standing in where:
            lesson = standing.lesson
            if lesson.stage == stage:
                name = f"[{lesson.title}]({_link(lesson)})" if lesson.is_written else lesson.title
                cells = (lesson.number, name, str(lesson.minutes), lesson.builds, standing.done)
                lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    lines += [
        "Every check writes this page anew; *File → Reload Markdown File from Disk* shows it as it is now.",
        "These lessons are your own copies: an update of the course brings new cells and keeps what you",
        "wrote. In a terminal, `python3 -m course_lib progress` shows this page, and",
        "`python3 -m course_lib check 01` checks a whole lesson.",
    ]
    return "\n".join(lines) + "\n"


def terminal_page(progress: Progress, of: Iterable[Lesson], work: Path) -> str:
    """The same for the terminal."""
    where = standings(progress, of)
    lines = [_summary(where)]
    if (standing := _next(where)) is not None:
        lesson = standing.lesson
        lines.append(
            f"Next: {lesson.number} {lesson.title}, exercise {standing.next_exercise},"
            f" in {lesson.work_copy(work)}"
        )
    width = max((len(standing.lesson.title) for standing in where), default=0)
    for stage, title in STAGES.items():
        lines += ["", title]
        for standing in where:
            lesson = standing.lesson
            if lesson.stage == stage:
                about = f"{lesson.title:<{width}}  {lesson.minutes:>3} min"
                lines.append(f"  {lesson.number}  {about}  {standing.done}")
    return "\n".join(lines)


def write_home(work: Path, store: ProgressStore) -> Path:
    """Write the home page of all lessons to `work` and return its path. Raises OSError, CourseError."""
    page = work / HOME
    write_text(page, home_page(store.read(), lessons()))
    return page


def _summary(where: list[Standing]) -> str:
    passed = sum(len(standing.passed) for standing in where)
    exercises = sum(len(standing.exercises) for standing in where)
    written = sum(standing.lesson.is_written for standing in where)
    return f"{passed} of {exercises} exercises passed. Lessons written so far: {written} of {len(where)}."


def _next(where: list[Standing]) -> Standing | None:
    return next((standing for standing in where if standing.next_exercise), None)


def _link(lesson: Lesson) -> str:
    return lesson.work_copy(Path()).as_posix()
