"""The source of a lesson, and the two editions that it contains.

Owns the meaning of `solutions/<stage>/NN_slug.py`: the front matter, which cells are exercises and which are
checks, the cell ids. Invariant: the learner's edition and the solved one have the same cells, with the same
ids, in the same order, and differ in exercise cells only; every exercise has one check cell.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching.lessons.percent import (
    FormatError,
    PercentCell,
    parse_code,
    split_cells,
    split_editions,
)

if TYPE_CHECKING:
    from course_lib.teaching.catalogue import Lesson

TAGS = ("exercise", "check", "exact")


class LessonError(CourseError):
    """A lesson's source, or a cell of it when it ran, is not as it must be."""


@dataclass(frozen=True)
class FrontMatter:
    """What the author says about a lesson; the catalogue says the rest."""

    lesson: str  # "01"
    objectives: tuple[str, ...]
    difficulty: int  # 1 to 4
    needs: tuple[str, ...]  # numbers of lessons
    opens: tuple[str, ...]  # paths from the repository's root
    terms: dict[str, str]  # a new term: what it is


@dataclass(frozen=True)
class SourceCell:
    """One cell, in both editions."""

    id: str
    kind: str  # "markdown" or "code"
    tags: tuple[str, ...]
    learner: str
    solved: str
    solution_lines: tuple[str, ...]  # the lines of its solution regions, as they stand
    exercise_id: str | None  # of exercise cells and of check cells
    target: str | None  # what an exercise cell's function replaces in the engine


@dataclass(frozen=True)
class LessonSource:
    """A lesson as its author wrote it."""

    front_matter: FrontMatter
    cells: tuple[SourceCell, ...]

    @cached_property
    def exercise_cells(self) -> dict[str, SourceCell]:
        """The exercise cells by exercise id, in order."""
        return {cell.exercise_id: cell for cell in self.cells if cell.exercise_id and "exercise" in cell.tags}

    @cached_property
    def check_cells(self) -> dict[str, SourceCell]:
        """The check cells by exercise id, in order."""
        return {cell.exercise_id: cell for cell in self.cells if cell.exercise_id and "check" in cell.tags}


def read_lesson(lesson: Lesson) -> LessonSource:
    """Read and verify a lesson's source. Raises LessonError, which names the file and the line."""
    path = lesson.source
    name = path.relative_to(REPO_ROOT) if path.is_relative_to(REPO_ROOT) else path
    try:
        header, cells = split_cells(path.read_text(encoding="utf-8"))
        source = LessonSource(_front_matter(header, lesson.number), _source_cells(cells, lesson.number))
    except FormatError as error:
        raise LessonError(f"{name}, {error}") from None
    except OSError as error:
        raise LessonError(f"lesson {lesson.number} has no source that can be read: {error}") from None
    exercises, checks = list(source.exercise_cells), list(source.check_cells)
    if exercises != checks:
        raise LessonError(
            f"{name}: the exercises are {exercises} and the check cells {checks}; they must be the same"
        )
    return source


def stub_of(lesson: Lesson, exercise_id: str) -> str:
    """The exercise's cell as the learner first sees it. Raises LessonError for an unknown exercise."""
    return _exercise_cell(lesson, exercise_id).learner


def solution_of(lesson: Lesson, exercise_id: str) -> str:
    """The exercise's cell with its solution. Raises LessonError for an unknown exercise."""
    return _exercise_cell(lesson, exercise_id).solved


def is_stub(cell_source: str, stub_source: str) -> bool:
    """Whether a cell still is the stub: the same program, whatever its comments, docstrings and layout."""
    try:
        return _program(cell_source) == _program(stub_source)
    except SyntaxError:  # a line magic, say: the learner has been at work
        return False


def _exercise_cell(lesson: Lesson, exercise_id: str) -> SourceCell:
    cells = read_lesson(lesson).exercise_cells
    if exercise_id not in cells:
        raise LessonError(
            f"lesson {lesson.number} has no exercise {exercise_id}: it has {', '.join(cells) or 'none'}"
        )
    return cells[exercise_id]


def _program(source: str) -> str:
    tree = parse_code(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return ast.dump(tree)


def _front_matter(header: str, number: str) -> FrontMatter:
    import yaml  # here, so that a kernel that only asks is_stub does without

    block = re.fullmatch(r"# ---\n(.*?)\n# ---\s*", header, flags=re.DOTALL)
    if block is None:
        raise FormatError(1, "a lesson begins with its front matter between two `# ---` lines")
    names = [field.name for field in fields(FrontMatter)]
    try:
        course = yaml.safe_load(re.sub("^# ?", "", block[1], flags=re.MULTILINE))["jupyter"]["course"]
        matter = FrontMatter(**{name: tuple(v) if isinstance(v, list) else v for name, v in course.items()})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        needed = f"the front matter needs jupyter: course: with {', '.join(names)}"
        raise FormatError(1, f"{needed} ({type(error).__name__}: {error})") from None
    lists = (matter.objectives, matter.needs, matter.opens)
    if not all(isinstance(texts, tuple) for texts in lists) or not isinstance(matter.terms, dict):
        raise FormatError(1, "in the front matter objectives, needs and opens are lists, and terms a mapping")
    texts = [text for some in (*lists, matter.terms, matter.terms.values()) for text in some]
    if not all(isinstance(text, str) for text in texts) or not isinstance(matter.difficulty, int):
        raise FormatError(1, "the front matter holds text in quotes, but for difficulty, a whole number")
    if matter.lesson != number:
        raise FormatError(1, f'the front matter says lesson: "{matter.lesson}", and this is "{number}"')
    return matter


def _source_cells(cells: Sequence[PercentCell], number: str) -> tuple[SourceCell, ...]:
    made: list[SourceCell] = []
    names: Counter[str] = Counter()
    for cell in cells:
        if not set(cell.tags) <= set(TAGS):
            raise FormatError(cell.line, f"tags are of {', '.join(TAGS)}, not {', '.join(cell.tags)}")
        learner = solved = cell.text
        solution_lines: tuple[str, ...] = ()
        exercise_id = target = None
        if not cell.markdown:
            editions = split_editions(cell)
            learner, solved, solution_lines = editions.learner, editions.solved, editions.solution_lines
            exercise_id, target = _exercise_of(cell, parse_code(solved), number)
        if solution_lines and "exercise" not in cell.tags:
            raise FormatError(cell.line, 'solution regions stand in cells with tags=["exercise"]')
        if exercise_id is None:
            digest = hashlib.sha256(cell.text.encode()).hexdigest()[:10]
            cell_id = f"{'md' if cell.markdown else 'code'}-{digest}"
        else:
            cell_id = f"{'ex' if 'exercise' in cell.tags else 'check'}-{exercise_id.replace('.', '-')}"
        names[cell_id] += 1
        if names[cell_id] > 1:
            if exercise_id is not None:
                raise FormatError(cell.line, f"this is the second such cell of exercise {exercise_id}")
            cell_id = f"{cell_id}-{names[cell_id]}"
        kind = "markdown" if cell.markdown else "code"
        texts = (learner, solved, solution_lines)
        made.append(SourceCell(cell_id, kind, cell.tags, *texts, exercise_id, target))
    return tuple(made)


def _exercise_of(cell: PercentCell, tree: ast.Module, number: str) -> tuple[str | None, str | None]:
    """(exercise id, target) of an exercise cell or a check cell; (None, None) of any other code cell."""
    decorators = [decorator for node in tree.body for decorator in getattr(node, "decorator_list", ())]
    calls = [decorator for decorator in decorators if _called(decorator) == "exercise"]
    if len(calls) != ("exercise" in cell.tags):
        raise FormatError(cell.line, '`@exercise("NN.n")` once in a tags=["exercise"] cell, never elsewhere')
    if "check" in cell.tags:
        calls = [node.value for node in tree.body if isinstance(node, ast.Expr)]
        if len(tree.body) != 1 or [_called(call) for call in calls] != ["check"]:
            raise FormatError(cell.line, 'a cell with tags=["check"] holds `check("NN.n")` and nothing else')
    if not calls:
        return None, None
    values: dict[Any, Any] = dict(enumerate(map(_constant, calls[0].args)))
    values |= {keyword.arg: _constant(keyword.value) for keyword in calls[0].keywords}
    if not isinstance(values.get(0), str) or not re.fullmatch(rf"{number}\.\d+", values[0]):
        raise FormatError(cell.line, f'exercises of this lesson are named "{number}.1", "{number}.2", …')
    return values[0], values.get("target")


def _called(node: ast.AST) -> str | None:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None


def _constant(node: ast.AST) -> Any:
    return node.value if isinstance(node, ast.Constant) else None
