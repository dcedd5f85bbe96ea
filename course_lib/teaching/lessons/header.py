"""The first cell of a lesson, made from the catalogue and the lesson's front matter.

Invariant: its links are relative, and lead to the same place from `notebooks/`, `solutions/` and `work/`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_lib.teaching import catalogue
from course_lib.teaching.lessons.lesson_source import LessonSource

if TYPE_CHECKING:
    from course_lib.teaching.catalogue import Lesson

HARDEST = 4


def header_of(lesson: Lesson, source: LessonSource) -> str:
    """The Markdown text. Raises CourseError if the lesson needs one that the catalogue does not know."""
    matter = source.front_matter
    stars = "★" * matter.difficulty + "☆" * (HARDEST - matter.difficulty)
    needs = [catalogue.lesson(number) for number in matter.needs]
    rows = {
        "Builds on": [f"[{need.number} {need.title}](../{need.stage}/{need.name}.ipynb)" for need in needs],
        "Opens": [f"[`{path}`](../../{path})" for path in matter.opens],
        "vLLM's example": [_in_vllm(lesson.vllm_example)],
        "vLLM's files": [_in_vllm(path) for path in lesson.vllm_files],
    }
    first = next(iter(source.exercise_cells), f"{lesson.number}.1")
    return "\n".join(
        [
            f"# Lesson {lesson.number}: {lesson.title}",
            "",
            f"{catalogue.STAGES[lesson.stage]} · {lesson.minutes} minutes · difficulty {stars}",
            "",
            f"**You build:** {lesson.builds}",
            "",
            "Afterwards you can",
            "",
            *(f"- {objective}" for objective in matter.objectives),
            "",
            "| | |",
            "|---|---|",
            *(f"| **{name}** | {', '.join(entries)} |" for name, entries in rows.items() if entries),
            "",
            f'**Help:** `check("{first}")` says what is wrong with your answer to exercise {first}, and'
            f' `hint("{first}")` gives the next of three hints. `solution("{first}")` opens after a pass or'
            f' the third failure; `solution("{first}", anyway=True)` opens at once, and that is allowed.',
        ]
    )


def _in_vllm(written: str) -> str:
    """A path of the catalogue; a release or project may follow it in parentheses."""
    path, _, where = written.partition(" (")
    return f"`{path}` ({where}" if where else f"`{path}`"
