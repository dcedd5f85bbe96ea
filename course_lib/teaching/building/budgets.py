"""Gate 7: the sizes of a lesson, its links and terms, and what ties its two files together.

Owns the numbers that every lesson keeps to. Returns problems as sentences, as `gates.py` does.
"""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.teaching.building.builder import EDITIONS, notebook_path
from course_lib.teaching.building.gates import gate, stored_notebook
from course_lib.teaching.checking.exercise_file import ExerciseFile, load_exercises
from course_lib.teaching.lessons.lesson_source import LessonError, LessonSource, read_lesson

if TYPE_CHECKING:
    from course_lib.teaching.catalogue import Lesson

KILOBYTE = 1024
WORDS = (1500, 2800)  # of prose, without the header
OBJECTIVES = (3, 5)
EXERCISES = (3, 5)
MOST_IN_FIRST = 6  # exercises in lesson 01
DIAGNOSTICS = 3  # at least, in each exercise
MEDIAN_LINES, MOST_LINES, MOST_EXERCISE_LINES = 8, 40, 60  # of code cells, blank lines not counted
WIDEST_LINE = 104  # characters; what JupyterLab shows in a window of 1,280 pixels beside its file browser
FIGURES = (3, 6)
FIGURE_KB, NOTEBOOK_KB = 40, 230
FILLERS = ("simply", "just", "easily", "obviously", "trivially", "basically", "of course")

_FENCE = re.compile(r"^```.*?^```|\$\$.*?\$\$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
_WORD = re.compile(r"\w[\w'’.-]*")
_MENTION = re.compile(
    r"\b(?:exercises?|questions?|check|hint|solution|predict|reveal)\b\W{1,3}((\d\d)\.(?:\d+|[a-z]))\b",
    re.IGNORECASE,
)


@gate
def is_well_formed(lesson: Lesson, course: Sequence[Lesson]) -> list[str]:
    """Gate 7. course: all lessons, for the terms and numbers of the others."""
    source, file = read_lesson(lesson), load_exercises(lesson.exercises)
    return [
        *_front_matter(lesson, source, course),
        *_prose(source, file),
        *_links(lesson, source, course),
        *_code(source),
        *_exercises(lesson, source, file),
        *_mentions(lesson, source, file),
        *_notebooks(lesson),
    ]


def prose_of(markdown: str) -> str:
    """The text without code, display formulas, comments and link targets."""
    return _LINK.sub("]", _CODE.sub(" ", _FENCE.sub(" ", markdown)))


def count_words(markdown: str) -> int:
    """The words of a Markdown text; code and display formulas have none."""
    return len(_WORD.findall(prose_of(markdown)))


def _outside(what: str, count: int, limits: tuple[int, int]) -> list[str]:
    low, high = limits
    return [] if low <= count <= high else [f"it has {count} {what}; there should be {low} to {high}."]


def _front_matter(lesson: Lesson, source: LessonSource, course: Sequence[Lesson]) -> Iterator[str]:
    matter = source.front_matter
    yield from _outside("objectives", len(matter.objectives), OBJECTIVES)
    yield from _outside("stars of difficulty", matter.difficulty, (1, 4))
    numbers = {other.number for other in course}
    for number in matter.needs:
        if number not in numbers or number >= lesson.number:
            yield f"it needs lesson {number}, which does not come before it."
    for path in matter.opens:
        if not (REPO_ROOT / path).is_file():
            yield f"it opens {path}, which does not exist."
    for term, meaning in matter.terms.items():
        if not meaning.strip():
            yield f"the term {term!r} has no definition."
    own = {term.casefold() for term in matter.terms}
    for other in course:
        if other.is_written and other.number < lesson.number:
            for term in read_lesson(other).front_matter.terms:
                if term.casefold() in own:
                    yield f"the term {term!r} is defined in lesson {other.number} already."


def _prose(source: LessonSource, file: ExerciseFile) -> Iterator[str]:
    texts = [cell.learner for cell in source.cells if cell.kind == "markdown"]
    yield from _outside("words of prose", count_words("\n\n".join(texts)), WORDS)
    texts += [*source.front_matter.objectives, *source.front_matter.terms.values()]
    for exercise in file.exercises.values():
        messages = [part.message for part in (*exercise.diagnostics.values(), *exercise.budgets)]
        texts += [exercise.title, exercise.spec, *exercise.hints, *messages]
    for question in file.questions.values():
        texts += [question.text, *(text for choice in question.choices for text in (choice.text, choice.why))]
    fillers = re.compile(rf"\b(?:{'|'.join(FILLERS)})\b", re.IGNORECASE)
    for text in texts:
        prose = prose_of(text)
        for filler in fillers.finditer(prose):
            around = " ".join(prose[max(0, filler.start() - 40) : filler.end() + 40].split())
            yield f"leave out {filler[0]!r}: … {around} …"


def _links(lesson: Lesson, source: LessonSource, course: Sequence[Lesson]) -> Iterator[str]:
    markdown = "\n\n".join(cell.learner for cell in source.cells if cell.kind == "markdown")
    text = _CODE.sub(" ", _FENCE.sub(" ", markdown))
    headings = {title.strip().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    to_be_built = {other.notebook.resolve() for other in course if other.is_written}
    for found in _LINK.finditer(text):
        link = found[1] or found[2]
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        if path:
            target = (lesson.notebook.parent / path).resolve()
            if Path(path).is_absolute() or not (target.exists() or target in to_be_built):
                yield f"the link {link} leads nowhere from {lesson.notebook.parent.name}/."
        elif anchor not in headings:
            yield f"the link {link} leads to no heading (they are named like #The-first-step)."


def _code(source: LessonSource) -> Iterator[str]:
    lengths = {
        cell.id: sum(bool(line.strip()) for line in cell.solved.splitlines())
        for cell in source.cells
        if cell.kind == "code"
    }
    if lengths and statistics.median(lengths.values()) > MEDIAN_LINES:
        yield f"half of its code cells have more than {MEDIAN_LINES} lines."
    for cell_id, length in lengths.items():
        most = MOST_EXERCISE_LINES if cell_id.startswith("ex-") else MOST_LINES
        if length > most:
            yield f"cell {cell_id} has {length} lines; {most} is the most."
    for cell in source.cells:
        if cell.kind == "code" and (widest := max(map(len, cell.solved.splitlines()))) > WIDEST_LINE:
            yield f"cell {cell.id} has a line of {widest} characters; {WIDEST_LINE} is the most."


def _exercises(lesson: Lesson, source: LessonSource, file: ExerciseFile) -> Iterator[str]:
    exercises = list(file.exercises.values())
    limits = (EXERCISES[0], MOST_IN_FIRST if lesson.number == "01" else EXERCISES[1])
    yield from _outside("exercises", len(exercises), limits)
    if list(source.exercise_cells) != list(file.exercises):
        yield f"its cells have {list(source.exercise_cells)}, its exercise file {list(file.exercises)}."
    for exercise in exercises:
        cell = source.exercise_cells.get(exercise.id)
        if cell is not None and cell.target != exercise.target:
            yield f"{exercise.id}: its cell has target {cell.target}, the exercise file {exercise.target}."
        if len(exercise.diagnostics) < DIAGNOSTICS:
            yield f"{exercise.id}: it has {len(exercise.diagnostics)} diagnostics and needs {DIAGNOSTICS}."
    if exercises and exercises[-1].stars < max(exercise.stars for exercise in exercises):
        yield "its last exercise should have the most stars."
    if not file.questions:
        yield "it has no Question to predict."
    code = "\n".join(cell.learner for cell in source.cells if cell.kind == "code")
    for question_id in file.questions:
        for call in ("predict", "reveal"):
            if f'{call}("{question_id}")' not in code:
                yield f'question {question_id} needs a cell with {call}("{question_id}").'


def _mentions(lesson: Lesson, source: LessonSource, file: ExerciseFile) -> Iterator[str]:
    known = {*file.exercises, *file.questions}
    for cell in source.cells:
        for mention, number in _MENTION.findall(cell.learner + "\n" + cell.solved):
            if number > lesson.number:
                yield f"cell {cell.id} mentions {mention}, which comes in a later lesson."
            elif number == lesson.number and mention not in known:
                yield f"cell {cell.id} mentions {mention}, which the exercise file does not have."


def _notebooks(lesson: Lesson) -> Iterator[str]:
    for edition in EDITIONS:
        path = notebook_path(lesson, edition)
        try:
            cells = stored_notebook(lesson, edition).cells
        except LessonError as error:  # the source's own problems are worth knowing before it is built
            yield str(error)
            continue
        figures = [
            (cell.id, len(base64.b64decode(output.data["image/png"])))
            for cell in cells
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", {})
        ]
        for problem in _outside("figures", len(figures), FIGURES):
            yield f"{edition} edition: {problem}"
        for cell_id, size in figures:
            if size > FIGURE_KB * KILOBYTE:
                kilobytes = f"{size / KILOBYTE:.1f} KB; {FIGURE_KB} is the most"
                yield f"{edition} edition: a figure of cell {cell_id} has {kilobytes}."
        size = path.stat().st_size
        if size > NOTEBOOK_KB * KILOBYTE:
            yield f"{edition} edition: the file has {size / KILOBYTE:.1f} KB; {NOTEBOOK_KB} is the most."
