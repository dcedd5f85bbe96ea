"""`lab`, `check` and `progress` on the command line.

Owns what these three say. Importing it costs nothing: `--help` works on a bare Python.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.errors import CourseError, SetupError

if TYPE_CHECKING:
    from course_lib.teaching.learner.progress import ProgressStore


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address instead of opening a browser"
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help="port to serve on (default: the first free from 8888)"
    )


def run_lab(args: argparse.Namespace) -> int:
    from course_lib.bootstrap.lab import become_jupyterlab
    from course_lib.teaching.learner.workspace import kernel_environment, work_folder

    work = work_folder()
    page = prepare(work)
    print("Opening JupyterLab. Stop it with Ctrl-C here, twice.", flush=True)
    become_jupyterlab(page, kernel_environment(work), browser=not args.no_browser, port=args.port)


def prepare(work: Path) -> Path:
    """Make or bring up to date all that `lab` shows, and return the page to open.

    What cannot be written is told, and is no reason not to open the rest. Raises SetupError if there is no
    work folder at all.
    """
    from course_lib.teaching.catalogue import lessons
    from course_lib.teaching.learner.home import write_home
    from course_lib.teaching.learner.progress import ProgressStore
    from course_lib.teaching.learner.workspace import make_welcome, update

    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(
            f"The folder {work} cannot be made ({error.strerror}): see to that, or name another one in the"
            " environment variable COURSE_WORK."
        ) from error
    store, page = ProgressStore(work), work
    for sentence in update(work, lessons(), _last_sources(store)):
        print(sentence)
    makers = {"welcome notebook": lambda: make_welcome(work), "home page": lambda: write_home(work, store)}
    for name, make in makers.items():
        try:
            page = make()
        except (OSError, CourseError) as error:
            print(f"The {name} could not be written: {error}")
    return page


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lesson", metavar="NN", help="the lesson's number")


def run_check(args: argparse.Namespace) -> int:
    from course_lib.teaching import catalogue
    from course_lib.teaching.learner.grading import grade
    from course_lib.teaching.learner.progress import ProgressStore
    from course_lib.teaching.learner.workspace import update, work_folder

    lesson, work = catalogue.lesson(args.lesson), work_folder()
    if not lesson.is_written:
        written = ", ".join(other.number for other in catalogue.lessons() if other.is_written)
        raise CourseError(f"lesson {lesson.number} is not written yet; so far there are {written}.")
    copy = lesson.work_copy(work)
    is_new = not copy.exists()
    for sentence in update(work, [lesson], _last_sources(ProgressStore(work))):
        print(sentence, flush=True)
    if is_new:
        print(
            f"You have not worked on lesson {lesson.number} yet: there is nothing to check."
            " `python3 -m course_lib lab` opens it."
        )
        return 1
    try:
        saved = time.strftime("%H:%M:%S", time.localtime(copy.stat().st_mtime))
        print(f"Checking {copy} as saved at {saved}.\n", flush=True)
        result = grade(lesson, work)
    except OSError as error:
        raise CourseError(f"lesson {lesson.number} could not be checked: {error}.") from error
    print(result.text())
    return 0 if result.passed else 1


def add_progress_arguments(parser: argparse.ArgumentParser) -> None:
    """`progress` takes none."""


def run_progress(args: argparse.Namespace) -> int:
    from course_lib.teaching.catalogue import lessons
    from course_lib.teaching.learner.home import terminal_page
    from course_lib.teaching.learner.progress import ProgressStore
    from course_lib.teaching.learner.workspace import work_folder

    work = work_folder()
    print(terminal_page(ProgressStore(work).read(), lessons(), work))
    return 0


def _last_sources(store: ProgressStore) -> dict[str, str]:
    """The exercise cells as they were checked last; empty, and a sentence, if the store cannot be read."""
    try:
        exercises = store.read().exercises
    except CourseError as error:
        print(error)
        return {}
    return {name: exercise.last_source for name, exercise in exercises.items() if exercise.last_source}
