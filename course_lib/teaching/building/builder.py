"""`python3 -m course_lib build`: a lesson's source becomes two executed notebooks.

Owns `notebooks/<stage>/NN_slug.ipynb` (the learner's edition) and `solutions/<stage>/NN_slug.ipynb` (the
solved one); nobody else writes them. Invariants: cells, ids and metadata follow from the source alone; both
notebooks are written, whole, after both have run without an error; no kernel outlives the call.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.bootstrap.process import on_terminal
from course_lib.errors import CourseError
from course_lib.teaching import catalogue
from course_lib.teaching.learner.workspace import kernel_environment
from course_lib.teaching.lessons import index
from course_lib.teaching.lessons.header import header_of
from course_lib.teaching.lessons.lesson_source import LessonError, LessonSource, SourceCell, read_lesson
from course_lib.teaching.lessons.nbval_run import CELL_TIMEOUT_S
from course_lib.teaching.notebook_files import course_metadata, digest, read_notebook, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from course_lib.teaching.catalogue import Lesson

VERSION = 1  # raise it when the notebooks made from an unchanged source change
EDITIONS = ("learner", "solved")
GUIDE_S = 30  # what a lesson may take to run on two cores
COMPARED = "nbval-check-output"  # nbval compares the outputs of cells with this tag
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
OnCell = Callable[[str, int, int], object]
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `build`."""
    parser.add_argument("lessons", nargs="*", metavar="NN", help="lessons (default: those out of date)")
    parser.add_argument("--check", action="store_true", help="build nothing; fail if one is out of date")


def run_build(args: argparse.Namespace) -> int:
    """Build the lessons named or out of date, then the indexes. Returns the exit status."""
    named = [catalogue.lesson(number) for number in args.lessons]
    for lesson in named:
        if not lesson.is_written:
            raise LessonError(f"lesson {lesson.number} is not written yet: there is no {lesson.source}")
    written = named or [lesson for lesson in catalogue.lessons() if lesson.is_written]
    if args.check:
        return _check(written)
    failed = 0
    for lesson in written:
        try:
            if named or is_stale(lesson):
                _build_aloud(lesson)
        except CourseError as error:
            print(f"\n{lesson.name}: {error}", file=sys.stderr)
            failed += 1
    if failed:
        print(f"\n{failed} of {len(written)} lessons failed; their notebooks are as before.", file=sys.stderr)
        return 1
    for page in index.write_indexes():
        print(f"{page.relative_to(REPO_ROOT)}: written")
    print("The notebooks and indexes are up to date.")
    return 0


def _check(written: Sequence[Lesson]) -> int:
    stale = [lesson.name for lesson in written if is_stale(lesson)]
    stale += [str(page.relative_to(REPO_ROOT)) for page in index.stale_indexes()]
    for name in stale:
        print(f"{name}: out of date")
    if stale:
        print("`python3 -m course_lib build` makes them again.")
    return 1 if stale else 0


def notebook_path(lesson: Lesson, edition: str) -> Path:
    """Where an edition of a lesson is kept."""
    return lesson.notebook if edition == "learner" else lesson.solution_notebook


def is_stale(lesson: Lesson) -> bool:
    """Whether a notebook of the lesson is missing, damaged, or made from another source than today's."""
    today = source_hash(lesson, read_lesson(lesson))
    for edition in EDITIONS:
        try:
            stored = course_metadata(read_notebook(notebook_path(lesson, edition)))
        except (OSError, CourseError):
            return True
        if stored.get("source_hash") != today:
            return True
    return False


def source_hash(lesson: Lesson, source: LessonSource) -> str:
    """SHA-256 of all that a lesson's notebooks are made from, and of the builder's version."""
    exercises = lesson.exercises.read_bytes() if lesson.exercises.exists() else b""
    # the header stands for what the catalogue says
    parts = (str(VERSION).encode(), lesson.source.read_bytes(), exercises, header_of(lesson, source).encode())
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def make_notebook(lesson: Lesson, edition: str) -> NotebookNode:
    """An edition of a lesson, not executed. Raises LessonError, which names the line of the source."""
    from nbformat import v4

    source = read_lesson(lesson)
    header = header_of(lesson, source)
    cells = [SourceCell("header", "markdown", (), header, header, (), None, None), *source.cells]
    course = {"lesson": lesson.number, "edition": edition, "source_hash": source_hash(lesson, source)}
    return v4.new_notebook(
        cells=[_notebook_cell(cell, edition) for cell in cells],
        metadata={"course": course, "kernelspec": dict(KERNELSPEC), "language_info": {"name": "python"}},
    )


def _notebook_cell(cell: SourceCell, edition: str) -> NotebookNode:
    from nbformat import v4

    metadata: dict[str, object] = {"course": {"base": digest(cell.learner)}}
    if cell.tags:
        compared = [COMPARED] if {"check", "exact"} & set(cell.tags) else []
        metadata["tags"] = [*cell.tags, *compared]
    make = v4.new_markdown_cell if cell.kind == "markdown" else v4.new_code_cell
    return make(cell.learner if edition == "learner" else cell.solved, id=cell.id, metadata=metadata)


def build(lesson: Lesson, execute: bool = True, on_cell: OnCell = lambda *at: None) -> None:
    """Make, run and write both editions of a lesson.

    execute: False leaves the outputs empty, for tests of what only reads notebooks.
    on_cell: called as on_cell(edition, number of the code cell from 1, how many there are) before each.
    Raises LessonError with cell and traceback when a cell fails; the notebooks are then as before.
    """
    import nbformat

    notebooks = {edition: make_notebook(lesson, edition) for edition in EDITIONS}
    if execute:
        for edition, notebook in notebooks.items():
            _execute(notebook, f"{edition} edition", partial(on_cell, edition))
    for edition, notebook in notebooks.items():
        write_text(notebook_path(lesson, edition), nbformat.writes(notebook) + "\n")


def lesson_environment(folder: Path) -> dict[str, str]:
    """The environment of a kernel that runs a lesson from the start: all it leaves behind is in `folder`."""
    return kernel_environment(
        folder / "work",
        IPYTHONDIR=str(folder / "ipython"),  # not the person's own start-up files
        MPLBACKEND="module://matplotlib_inline.backend_inline",
    )


def _execute(notebook: NotebookNode, name: str, on_cell: Callable[[int, int], object]) -> None:
    """Run the notebook in a kernel of this interpreter and store its outputs in it."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_core.utils import run_sync
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, DeadKernelError

    code = [(position, cell) for position, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    with tempfile.TemporaryDirectory(prefix="course-build-") as folder, tempfile.TemporaryFile("w+") as log:
        # no folder to look for kernels in: what remains is the interpreter that runs this
        kernels = KernelSpecManager(kernel_dirs=[])
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
        client = NotebookClient(
            notebook, km=manager, timeout=CELL_TIMEOUT_S, record_timing=False, coalesce_streams=True
        )
        environment = lesson_environment(Path(folder))
        try:
            # cell by cell: nbclient's own loop takes Ctrl-C for itself and then reports a dead kernel
            with client.setup_kernel(cwd=folder, env=environment, stderr=log, cleanup_kc=True):
                for number, (position, cell) in enumerate(code, 1):
                    on_cell(number, len(code))
                    client.execute_cell(cell, position, execution_count=number)
        except (CellControlSignal, DeadKernelError) as error:
            problem = _ANSI.sub("", str(error)).strip()
            if isinstance(error, DeadKernelError):
                log.seek(0)
                problem += "\n" + log.read()[-2000:]  # what the process said when it died
            raise LessonError(f"{name}: cell {number} ({cell.id}) failed:\n{problem}") from None
        finally:
            if manager.has_kernel:  # interrupted while it started
                run_sync(manager.shutdown_kernel)(now=True)
    for _, cell in code:
        cell.outputs = [output for output in map(_lasting, cell.outputs) if output is not None]


def _lasting(output: NotebookNode) -> NotebookNode | None:
    """The output without what means something to a live kernel only; None if nothing else is in it."""
    if "data" not in output:
        return output
    output.data.pop(WIDGET_VIEW, None)
    return output if output.data else None


def _build_aloud(lesson: Lesson) -> None:
    started = time.monotonic()
    begin, end = ("\r", "") if on_terminal() else ("", "\n")

    def on_cell(edition: str, number: int, count: int) -> None:
        if number == 1 or on_terminal():
            progress = f"cell {number} of {count}" if on_terminal() else f"{count} cells"
            print(f"{begin}{lesson.name}: {edition} edition, {progress} ", end=end, flush=True)

    build(lesson, on_cell=on_cell)
    seconds = (time.monotonic() - started) / len(EDITIONS)
    remark = f", longer than the {GUIDE_S} s that a lesson should take" if seconds > GUIDE_S else ""
    print(f"{begin}{lesson.name}: built, {seconds:.0f} s an edition{remark}".ljust(50), flush=True)
