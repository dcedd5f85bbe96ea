"""`check NN`: what nbval finds in a learner's notebook, whatever is in it; and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching.learner import grading
from course_lib.teaching.learner.grading import grade, graded_notebook
from course_lib.teaching.learner.progress import ProgressStore
from course_lib.teaching.learner.workspace import update
from course_lib.teaching.lessons import nbval_run
from course_lib.teaching.lessons.cell_reports import pytest_runtest_makereport
from course_lib.teaching.notebook_files import read_notebook
from tests.teaching.miniatures import SOLVED, edit, make_lesson, own

RIGHT = {"ex_01_1": SOLVED.format(1), "ex_01_2": SOLVED.format(2)}


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    return make_lesson(tmp_path / "repository", monkeypatch)


@pytest.fixture
def work(tmp_path, lesson):
    update(tmp_path / "work", [lesson], {})
    return tmp_path / "work"


def save(lesson, work, inserted=(), deleted=(), **sources):
    """The learner's notebook with cells of their own: pairs (id of the cell before, source)."""
    copy = lesson.work_copy(work)
    notebook = read_notebook(copy)
    for number, (before, source) in enumerate(inserted):
        ids = [cell["id"] for cell in notebook["cells"]]
        notebook["cells"].insert(ids.index(before) + 1, own(source, f"mine-{number}"))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] not in deleted]
    edit(copy, notebook, **sources)
    return copy.read_bytes()


def nothing_left(lesson, work):
    return [path.name for path in lesson.work_copy(work).parent.iterdir()] == ["01_mini.ipynb"]


def test_check_cells_are_the_solved_lessons(lesson, work):
    save(lesson, work, deleted=["check-01-1"], inserted=[("ex-01-1", "mine")], check_01_2="print('cheating')")
    copy = read_notebook(lesson.work_copy(work))
    copy["cells"][1] |= {"outputs": [1], "execution_count": 1, "metadata": {"tags": ["nbval-check-output"]}}
    cells = graded_notebook(copy, read_notebook(lesson.solution_notebook))["cells"]
    ids = [cell["id"] for cell in cells]
    assert ids[3:6] == ["ex-01-1", "check-01-1", "mine-0"] and len(ids) == 10
    for cell in cells:
        if cell["id"].startswith("check-"):
            assert cell["source"].startswith("check(") and cell["outputs"] and cell["execution_count"]
            assert "nbval-check-output" in cell["metadata"]["tags"]
        elif cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_a_solved_lesson_that_never_ran_is_refused(lesson, work):
    with pytest.raises(CourseError, match="no outputs to compare with"):
        graded_notebook(read_notebook(lesson.work_copy(work)), read_notebook(lesson.notebook))


def test_a_right_notebook_passes_where_it_lies(lesson, work):
    here = lesson.work_copy(work).parent
    expected = f"import os; assert (os.getcwd(), os.environ['COURSE_WORK']) == ({str(here)!r}, {str(work)!r})"
    more = "said = check\ndef check(name):\n    said(name)\n    print('Note: it prints.')"
    before = save(lesson, work, inserted=[("code-toys", expected), ("code-toys", more)], **RIGHT)
    result = grade(lesson, work)
    assert result.passed and result.troubles == ()
    # what only this learner's check said is shown; what every pass says is not
    assert result.text() == (
        "01.1 · passed\nNote: it prints.\n\n01.2 · passed\nNote: it prints.\n\n2 of 2 exercises passed."
    )
    assert lesson.work_copy(work).read_bytes() == before and nothing_left(lesson, work)


def test_whatever_the_other_cells_do_every_check_counts(lesson, work, monkeypatch):
    monkeypatch.setattr(nbval_run, "CELL_TIMEOUT_S", 2)
    inserted = [
        ("code-toys", "while True: pass"),
        ("md-first", "print('x' * 10_000_000)"),
        ("ex-01-1", "# my try\nundefined"),
    ]
    save(lesson, work, inserted, deleted=["check-01-1"], ex_01_1=SOLVED.format(1))
    result = grade(lesson, work)
    assert [exercise.passed for exercise in result.exercises] == [True, False] and not result.passed
    assert result.exercises[1].said == "01.2 · not right yet\nMultiply x by itself."
    assert result.troubles == (
        "In the cell that begins with `while True: pass`: it took longer than 2 s and was stopped",
        "In the cell that begins with `# my try`: NameError: name 'undefined' is not defined",
    )
    assert result.text().endswith("1 of 2 exercises passed.")


def test_what_cannot_be_checked_here_neither_passes_nor_fails(lesson, work):
    unavailable = "checked = check\ndef check(name):\n    checked(name) if name != '01.2' else print(said)"
    said = "said = '01.2 · cannot be checked here: there is no Triton.'"
    inserted = [("code-toys", f"{said}\n{unavailable}")]
    save(lesson, work, inserted, ex_01_1=SOLVED.format(1), ex_01_2="import no_such_module")
    result = grade(lesson, work)
    assert [exercise.passed for exercise in result.exercises] == [True, None]
    assert result.passed and result.troubles == ()
    assert result.text() == (
        "01.1 · passed\n\n01.2 · cannot be checked here: there is no Triton.\n\n"
        "1 of 2 exercises passed, 1 cannot be checked here."
    )


def test_a_pass_whose_saved_copy_has_no_verdict_is_told_as_such(lesson, work):
    store = ProgressStore(work)
    for exercise in ("01.1", "01.2"):
        store.record_attempt(exercise, "passed", "")
    save(lesson, work, ex_01_1=SOLVED.format(1), ex_01_2="not Python")
    grade(lesson, work)
    known = store.read()
    assert (known.of("01.1").has_slipped, known.of("01.2").has_slipped) == (False, True)
    assert known.of("01.2").passed and known.of("01.2").attempts == 1
    assert (work / "HOME.md").exists()


def test_a_dead_kernel_fails_what_comes_after_it(lesson, work, monkeypatch):
    monkeypatch.setattr(nbval_run, "CELL_TIMEOUT_S", 1)
    save(lesson, work, [("check-01-1", "import os; os._exit(1)")], **RIGHT)
    result = grade(lesson, work)
    assert [exercise.passed for exercise in result.exercises] == [True, False]
    assert result.exercises[1].said == "01.2 · not checked: the notebook's kernel was gone by then"
    assert "Python crashed" in result.troubles[0] and nothing_left(lesson, work)


def test_cells_in_a_row_with_one_problem_share_a_sentence():
    cells = [(own(source, source), "gone") for source in ("", "b\nc")] + [(own("d", "d"), "other")]
    assert grading._troubles(cells) == (
        "In the cell that begins with `` (and in 1 after it): gone",
        "In the cell that begins with `d`: other",
    )


@pytest.mark.parametrize(
    ("changes", "passed"), [({}, True), ({"wasxfail": "timed out"}, False), ({"passed": False}, False)]
)
def test_an_excused_failure_is_no_pass(tmp_path, monkeypatch, changes, passed):
    file = tmp_path / "reports"
    monkeypatch.setenv("COURSE_CELL_REPORTS", str(file))
    item = SimpleNamespace(cell_num=3, test_outputs=None)
    report = SimpleNamespace(**{"when": "call", "passed": True, "failed": False, "longreprtext": "", **changes})
    hook = pytest_runtest_makereport(item, SimpleNamespace(excinfo=None))
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(report)
    assert f'"cell": 3, "passed": {str(passed).lower()}' in file.read_text()


@pytest.mark.parametrize(("name", "told"), [("ValueError", "ValueError: too long"), ("_Private", "too long")])
def test_a_private_exception_is_told_without_its_name(tmp_path, monkeypatch, name, told):
    file = tmp_path / "reports"
    monkeypatch.setenv("COURSE_CELL_REPORTS", str(file))
    outputs = [{"output_type": "error", "ename": name, "evalue": "too long"}]
    item = SimpleNamespace(cell_num=0, test_outputs=outputs)
    failed = SimpleNamespace(excinfo=SimpleNamespace(value=Exception("failed")))
    hook = pytest_runtest_makereport(item, failed)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(SimpleNamespace(when="call", passed=False, failed=True, longreprtext=""))
    assert f'"problem": "{told}"' in file.read_text()


def test_nbval_that_does_not_start_is_told_with_its_last_words(lesson, work, monkeypatch):
    monkeypatch.setattr(nbval_run, "run", lambda *args, output, **kwargs: output.write_text("no module nbval"))
    with pytest.raises(CourseError, match="(?s)could not be run.*no module nbval"):
        grade(lesson, work)
    assert nothing_left(lesson, work)


@pytest.mark.parametrize("whole_group", [True, False], ids=["in a terminal", "sent to the command alone"])
def test_ctrl_c_leaves_nothing_behind(lesson, work, tmp_path, whole_group):
    pid_file = tmp_path / "pid"
    tell = f"open({str(pid_file)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}} ')"
    save(lesson, work, [("code-toys", f"import os, time; {tell}; time.sleep(60)")])
    program = (
        "import sys; from pathlib import Path; from course_lib.teaching.learner import grading\n"
        "from tests.teaching.miniatures import make_lesson\n"
        "patch = type('Patch', (), {'setattr': setattr})\n"
        "grading.grade(make_lesson(Path(sys.argv[1]), patch), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(lesson.source.parents[2]), str(work)]
    environment = {**os.environ, "PYTHONPATH": str(REPO_ROOT)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        _wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith(" "))
        os.killpg(process.pid, signal.SIGINT) if whole_group else process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
    kernel, pytest_process = map(int, pid_file.read_text().split())
    _wait_until(lambda: not _is_alive(kernel) and not _is_alive(pytest_process))
    assert nothing_left(lesson, work)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # a zombie that nobody waits for is dead enough
        return sys.platform != "linux" or "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
