"""progress.json: what is counted, two writers at once, and every way in which it can be found broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course_lib.errors import CourseError
from course_lib.teaching.learner.answers import store_answer
from course_lib.teaching.learner.progress import ExerciseProgress, Progress, ProgressStore

WRITER = """
import sys
from pathlib import Path
from course_lib.teaching.learner.progress import ProgressStore
store = ProgressStore(Path(sys.argv[1]))
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    store.record_attempt(sys.argv[2], "wrong", "x = 1\\n" * 2000)
"""


def writer(work: Path, exercise_id: str, times: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(work), exercise_id, str(times)], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def store(tmp_path: Path) -> ProgressStore:
    return ProgressStore(tmp_path / "work")


def test_nothing_is_known_and_nothing_made_before_the_first_attempt(store: ProgressStore) -> None:
    assert store.read() == Progress()
    assert not store.work.exists()


def test_attempts_are_counted_and_a_pass_stays(store: ProgressStore) -> None:
    store.record_attempt("01.2", "wrong", "first")
    store.record_attempt("01.2", "raised", "second")
    passed = store.record_attempt("01.2", "passed", "third")
    assert (passed.attempts, passed.failures, passed.passed) == (3, 2, True)
    later = store.record_attempt("01.2", "mistake", "fourth")
    assert later.passed and later.passed_at == passed.passed_at != ""
    assert (later.last_verdict, later.last_source) == ("mistake", "fourth")


@pytest.mark.parametrize(
    "verdicts, unlocked", [(["wrong"] * 2, False), (["wrong"] * 3, True), (["passed"], True)]
)
def test_what_unlocks_the_solution(store: ProgressStore, verdicts: list[str], unlocked: bool) -> None:
    for verdict in verdicts:
        store.record_attempt("01.1", verdict, "")
    assert store.read().of("01.1").is_unlocked is unlocked


def test_hints_stop_at_the_last_and_choices_can_change(store: ProgressStore) -> None:
    assert [store.record_hint("01.1", 3).hints for _ in range(5)] == [1, 2, 3, 3, 3]
    assert store.record_solution_seen("01.1").solution_seen
    store.record_choice("01.a", "A")
    store.record_choice("01.a", "C")
    assert store.read().questions == {"01.a": "C"}


def test_two_processes_lose_nothing(store: ProgressStore) -> None:
    writers = [writer(store.work, exercise_id, 25) for exercise_id in ("01.1", "02.1")]
    for _ in range(25):
        store.record_attempt("01.1", "wrong", "")
    assert [each.wait() for each in writers] == [0, 0]
    assert {name: one.attempts for name, one in store.read().exercises.items()} == {"01.1": 50, "02.1": 25}


def test_kill_in_the_middle_of_writing(store: ProgressStore) -> None:
    attempts = 0
    for pause in (0.0, 0.003, 0.011):
        victim = writer(store.work, "01.1", 100_000)
        assert victim.stdout.readline() == "ready\n"
        before = time.monotonic()
        while store.read().of("01.1").attempts == attempts and time.monotonic() < before + 5:
            pass
        time.sleep(pause)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        json.loads(store.path.read_text())
        now = store.record_attempt("01.1", "wrong", "").attempts
        assert now > attempts + 1
        attempts = now
    assert not list(store.work.glob("progress.damaged-*"))


NOT_PROGRESS = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "another file": b"[1, 2]",
    "no version": b'{"exercises": {}, "questions": {}}',
    "wrong types": b'{"version": 1, "exercises": {"01.1": {"passed": "yes"}}, "questions": {}}',
    "choice": b'{"version": 1, "exercises": {}, "questions": {"01.a": 3}}',
}


@pytest.mark.parametrize("damage", ["truncated", *NOT_PROGRESS])
def test_a_damaged_file_is_set_aside_and_restored(
    store: ProgressStore, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store.record_attempt("01.1", "passed", "one")
    store.record_attempt("01.2", "passed", "two")
    store_answer(store.work, "01.2", "")
    store.record_attempt("01.2", "wrong", "three")
    broken = NOT_PROGRESS.get(damage, store.path.read_bytes()[:-40])
    store.path.write_bytes(broken)

    progress = store.read()
    assert progress.of("01.1") == ExerciseProgress(
        passed=True,
        attempts=1,
        last_verdict="passed",
        last_source="one",
        passed_at=progress.of("01.1").passed_at,
    )
    assert progress.of("01.2").passed
    assert capsys.readouterr().out == (
        "progress.json was damaged: it is now progress.damaged-1.json,"
        " and what you had done was restored from its backup.\n"
    )
    assert (store.work / "progress.damaged-1.json").read_bytes() == broken
    assert store.read() == progress and capsys.readouterr().out == ""  # mended once and for all


def test_without_a_backup_the_stored_answers_tell(
    store: ProgressStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store_answer(store.work, "01.2", "")
    store.path.write_text("{")
    assert store.record_hint("01.1", 3).hints == 1
    assert store.read().of("01.2").passed
    assert capsys.readouterr().out.endswith("was restored from the answers stored beside it.\n")
    store.path.write_text("")
    store.backup.write_text("")
    (store.work / "answers" / "01_2.py").unlink()
    assert store.read() == Progress()
    assert capsys.readouterr().out == (
        "progress.json was damaged: it is now progress.damaged-2.json, and nothing could be restored.\n"
    )


def test_a_deleted_file_is_restored_from_its_backup(
    store: ProgressStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.record_attempt("01.1", "passed", "one")
    store_answer(store.work, "01.2", "")
    store.record_hint("01.1", 3)
    for use in (store.read, lambda: store.record_hint("01.1", 3)):
        store.path.unlink()
        use()
        assert store.read().of("01.1").passed and store.read().of("01.2").passed
        assert capsys.readouterr().out == (
            "progress.json was gone (to begin anew, delete progress.bak.json with it):"
            " what you had done was restored from its backup.\n"
        )
    store.path.unlink()
    store.backup.unlink()
    assert store.read() == Progress() and not store.path.exists() and capsys.readouterr().out == ""


def test_a_pass_that_does_not_hold_any_more(store: ProgressStore) -> None:
    store.record_verdict("01.1", "unavailable")
    assert (store.read().of("01.1").attempts, store.read().of("01.1").is_unavailable) == (0, True)
    assert not store.record_attempt("01.1", "passed", "").is_unavailable
    assert not store.read().of("01.1").has_slipped
    assert store.record_attempt("01.1", "wrong", "").has_slipped
    assert not store.record_verdict("01.1", "unavailable").has_slipped
    assert store.record_verdict("01.1", "not done").has_slipped
    assert not store.record_attempt("01.1", "passed", "").has_slipped
    assert not store.record_attempt("01.2", "wrong", "").has_slipped


def test_the_file_of_a_newer_course_is_left_alone(store: ProgressStore) -> None:
    store.work.mkdir()
    store.path.write_text(newer := '{"version": 2}')
    for use in (store.read, lambda: store.record_hint("01.1", 3)):
        with pytest.raises(CourseError, match="newer edition of this course: update the course"):
            use()
    assert store.path.read_text() == newer


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CourseError, match=r"cannot be written .*Not a directory.*COURSE_WORK"):
        ProgressStore(tmp_path / "file" / "work").record_attempt("01.1", "wrong", "")


def test_a_read_only_folder(store: ProgressStore) -> None:
    store.record_attempt("01.1", "wrong", "")
    store.work.chmod(0o500)
    try:
        if os.access(store.work, os.W_OK):
            pytest.skip("root may write everywhere")
        with pytest.raises(CourseError, match=r"cannot be written .*Permission denied.*COURSE_WORK"):
            store.record_attempt("01.1", "wrong", "")
        assert store.read().of("01.1").attempts == 1
    finally:
        store.work.chmod(0o700)


def test_a_full_disk_leaves_the_old_file(store: ProgressStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.record_attempt("01.1", "wrong", "")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("course_lib.teaching.learner.progress.write_text", full)
    with pytest.raises(CourseError, match="No space left on device"):
        store.record_attempt("01.1", "wrong", "")
    assert store.read().of("01.1").attempts == 1
