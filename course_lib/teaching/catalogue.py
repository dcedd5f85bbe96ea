"""Which lessons there are, and where each has its files.

Owns `catalogue.toml`: the order, titles and times, what a lesson builds, and where vLLM does the same. A
lesson exists here before it is written. Standard library only: `progress` reads it before the set-up.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError

CATALOGUE = Path(__file__).with_name("catalogue.toml")

# folder -> heading, in the order of the course
STAGES = {
    "stage1_core": "Stage 1: Core",
    "stage2_performance": "Stage 2: Performance",
    "stage3_models_and_hardware": "Stage 3: Models and hardware",
    "stage4_multimodal": "Stage 4: Multimodal",
    "stage5_production": "Stage 5: Production",
    "advanced": "Advanced",
}


@dataclass(frozen=True)
class Lesson:
    """What is known of a lesson without opening it."""

    number: str  # "01" to "43"
    slug: str  # its title as part of a file name
    stage: str  # a key of STAGES
    title: str
    minutes: int
    builds: str  # what the learner builds there, in a line
    vllm_example: str  # as in vLLM 0.8.5; another release follows in parentheses
    vllm_files: tuple[str, ...]  # as in vLLM 0.32; another release or project follows in parentheses
    vllm_example_now: str = ""  # the nearest example of 0.32, if there is one
    moved: str = ""  # what changed place between the two releases; Markdown
    note: str = ""  # what else a reader of vLLM should know; Markdown

    @property
    def name(self) -> str:
        """`01_basic`: what its files are called."""
        return f"{self.number}_{self.slug}"

    @property
    def source(self) -> Path:
        """What its author writes, and both notebooks are built from."""
        return REPO_ROOT / "solutions" / self.stage / f"{self.name}.py"

    @property
    def solution_notebook(self) -> Path:
        """The solved edition."""
        return self.source.with_suffix(".ipynb")

    @property
    def notebook(self) -> Path:
        """The learner's edition, as the course ships it."""
        return REPO_ROOT / "notebooks" / self.stage / f"{self.name}.ipynb"

    @property
    def exercises(self) -> Path:
        """The cases, hints and diagnostics of its exercises."""
        return REPO_ROOT / "exercises" / self.stage / f"{self.name}.py"

    def work_copy(self, work: Path) -> Path:
        """The learner's own copy in the folder `work`."""
        return work / self.stage / f"{self.name}.ipynb"

    @property
    def is_written(self) -> bool:
        """Whether it has a source."""
        return self.source.exists()


@cache
def lessons() -> tuple[Lesson, ...]:
    """All lessons, in order."""
    entries = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))["lesson"]
    return tuple(Lesson(**{**entry, "vllm_files": tuple(entry["vllm_files"])}) for entry in entries)


def lesson(number: str | int) -> Lesson:
    """The lesson called 1, "1", "01" or "01_basic". Raises CourseError naming what there is."""
    asked = str(number).strip()
    for candidate in lessons():
        if asked == candidate.name or (asked.isdecimal() and int(asked) == int(candidate.number)):
            return candidate
    names = {spelling: each.name for each in lessons() for spelling in (each.slug, each.name)}
    close = get_close_matches(asked.lower(), names, n=1)
    meant = f" Did you mean {names[close[0]]}?" if close else ""
    first, last = lessons()[0], lessons()[-1]
    raise CourseError(
        f"There is no lesson {asked!r}: lessons are called by number, {first.number} to {last.number},"
        f" or by name, such as {first.name}.{meant}"
    )
