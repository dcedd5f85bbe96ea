"""The pages made from the catalogue: the README's table of lessons, `notebooks/README.md` and the glossary.

Owns those two files and what stands between the README's two markers; nobody edits them by hand. Invariant:
the pages follow from the catalogue and the front matter of the written lessons alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching.catalogue import STAGES, Lesson, lessons
from course_lib.teaching.lessons.lesson_source import read_lesson
from course_lib.teaching.notebook_files import write_text

BEGIN, END = "<!-- lessons:begin -->", "<!-- lessons:end -->"

_EXAMPLES_OF, _FILES_OF = "0.8.5", "0.32"  # the releases that a path belongs to when it names none
_REFERENCE = re.compile(r"(?P<path>\S+)(?: \((?P<where>[^()]+)\))?")
# where a path may be -> what makes it a link; vllm-neuron has no release to link to
_TREES = {
    "0.8.5": "https://github.com/vllm-project/vllm/blob/v0.8.5/",
    "0.9.2": "https://github.com/vllm-project/vllm/blob/v0.9.2/",
    "0.32": "https://github.com/vllm-project/vllm/blob/v0.32.0/",
    "tpu-inference": "https://github.com/vllm-project/tpu-inference/blob/v0.27.0/",
}

_GUIDE = """\
# The lessons

<!-- made by `python3 -m course_lib build`: edit course_lib/teaching/catalogue.toml instead -->

`python3 -m course_lib lab` opens the course and makes your own copies of these notebooks in `work/`: write
and run there, for an update replaces the files here and keeps yours. Begin with lesson 01; the first cell of
each lesson names those it builds on, and the terms that they define are in the [glossary](GLOSSARY.md).
`python3 -m course_lib check 01` grades a whole lesson, and `../solutions/` holds every lesson solved.

## The same in vLLM

Each lesson follows one of vLLM's own examples, as it was in 0.8.5, and ends at the files where vLLM does the
same, as they are in 0.32; where it is another release or project, that stands beside the path. Every path was
looked up, because many that go round never existed.
"""
_GLOSSARY = """\
# Glossary

<!-- made by `python3 -m course_lib build` from the `terms` of each lesson's front matter -->

The terms of the course, with the lesson that introduces each.
"""


def lesson_table(of: Sequence[Lesson]) -> str:
    """The README's tables, one a stage, between the markers; links are from the repository's root."""
    lines = [BEGIN]
    for stage, title in STAGES.items():
        lines += ["", f"### {title}", "", "| | lesson | minutes | what you build |", "|---|---|---|---|"]
        for lesson in of:
            if lesson.stage == stage:
                shown = _title(lesson, "notebooks/")
                lines.append(f"| {lesson.number} | {shown} | {lesson.minutes} | {lesson.builds} |")
    return "\n".join([*lines, "", END])


def with_lesson_table(readme: str, of: Sequence[Lesson]) -> str:
    """The README with today's tables. Raises CourseError if it lacks the markers, or has one twice."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or END not in rest:
        raise CourseError(
            f"README.md needs the lines {BEGIN} and {END}, each once, where the table of lessons goes."
        )
    return before + lesson_table(of) + after


def notebooks_readme(of: Sequence[Lesson]) -> str:
    """`notebooks/README.md`: how to use the folder, then each lesson's example and files in vLLM."""
    lines = [_GUIDE]
    for stage, title in STAGES.items():
        lines += [f"### {title}", ""]
        for lesson in of:
            if lesson.stage == stage:
                lines += [*_in_vllm(lesson), ""]
    return "\n".join(lines).rstrip() + "\n"


def glossary(terms: Iterable[tuple[Lesson, Mapping[str, str]]]) -> str:
    """`notebooks/GLOSSARY.md` from the terms that each lesson defines.

    Raises CourseError if a term is defined twice.
    """
    entries: dict[str, tuple[str, str, Lesson]] = {}
    for lesson, defined in terms:
        for term, meaning in defined.items():
            key = term.casefold()
            if key in entries:
                first = entries[key][2].number
                raise CourseError(
                    f"The term {term!r} is defined twice, in lessons {first} and {lesson.number}: keep it in"
                    " the front matter of the lesson that introduces it."
                )
            entries[key] = (term, meaning, lesson)
    lines = [_GLOSSARY]
    for _, (term, meaning, lesson) in sorted(entries.items()):
        link = f"[{lesson.number} {lesson.title}]({lesson.stage}/{lesson.name}.ipynb)"
        lines.append(f"- **{term}**: {meaning.rstrip('.')}. ({link})")
    return "\n".join(lines).rstrip() + "\n"


def write_indexes() -> list[Path]:
    """Bring the pages up to date and return those that changed; each is replaced in one step.

    Raises CourseError if the README lacks its markers or a lesson cannot be read; nothing is written then.
    """
    changed = _changed_pages()
    for path, text in changed.items():
        write_text(path, text)
    return list(changed)


def stale_indexes() -> list[Path]:
    """The pages that are not as `write_indexes` would leave them. Raises CourseError as it does."""
    return list(_changed_pages())


def _changed_pages() -> dict[Path, str]:
    readme, folder = REPO_ROOT / "README.md", REPO_ROOT / "notebooks"
    terms = [(lesson, read_lesson(lesson).front_matter.terms) for lesson in lessons() if lesson.is_written]
    pages = {
        readme: with_lesson_table(readme.read_text(encoding="utf-8"), lessons()),
        folder / "README.md": notebooks_readme(lessons()),
        folder / "GLOSSARY.md": glossary(terms),
    }
    return {p: text for p, text in pages.items() if not p.exists() or p.read_text(encoding="utf-8") != text}


def _title(lesson: Lesson, folder: str) -> str:
    if not lesson.is_written:
        return f"{lesson.title} (coming)"
    return f"[{lesson.title}]({folder}{lesson.stage}/{lesson.name}.ipynb)"


def _in_vllm(lesson: Lesson) -> list[str]:
    example = _reference(lesson.vllm_example, _EXAMPLES_OF)
    now = _reference(lesson.vllm_example_now, _FILES_OF) if lesson.vllm_example_now else "gone"
    return [
        f"**{lesson.number} {_title(lesson, '')}**",
        "",
        f"- the example: {example}",
        f"- in 0.32: {now}",
        "- where it happens:",
        *(f"    - {_reference(path, _FILES_OF)}" for path in lesson.vllm_files),
        *(f"- {remark}" for remark in (lesson.moved, lesson.note) if remark),
    ]


def _reference(written: str, release: str) -> str:
    """A path of the catalogue as a link, with the release or project it is in if that is not `release`."""
    match = _REFERENCE.fullmatch(written)
    if match is None:
        raise CourseError(
            f"catalogue.toml: {written!r} should be a path, then perhaps a release in parentheses."
        )
    path, where = match["path"], match["where"] or release
    link = f"[`{path}`]({_TREES[where]}{path})" if where in _TREES else f"`{path}`"
    return f"{link} ({where})" if where != release else link
