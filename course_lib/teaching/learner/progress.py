"""What a learner has done: `work/progress.json`.

Owns that file. Invariants: it is replaced in one step, by one process at a time, so it is whole whenever it
is read; `progress.bak.json` is the version before. A file that is damaged all the same is set aside, never
overwritten, and what it held is restored from the backup and from the stored answers. So is one that is gone
while its backup is there: who wants to begin anew deletes both.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from course_lib.errors import CourseError
from course_lib.teaching.learner.answers import stored_answers
from course_lib.teaching.notebook_files import write_text

VERSION = 1
FAILURES_TO_UNLOCK = 3


@dataclass(frozen=True)
class ExerciseProgress:
    """What is known of one exercise. Once passed, it stays passed."""

    passed: bool = False
    attempts: int = 0
    failures: int = 0
    hints: int = 0
    solution_seen: bool = False
    last_verdict: str = ""  # the kind of verdict: "passed", "wrong", "unavailable", …
    last_source: str = ""  # the exercise cell as it was checked last
    passed_at: str = ""  # ISO 8601, UTC; "" while not passed

    @property
    def is_unlocked(self) -> bool:
        """Whether the solution is open."""
        return self.passed or self.failures >= FAILURES_TO_UNLOCK

    @property
    def has_slipped(self) -> bool:
        """Whether it passed once, and failed when it was checked last."""
        return self.passed and self.last_verdict not in ("passed", "unavailable")

    @property
    def is_unavailable(self) -> bool:
        """Whether it is open because it cannot be checked on this machine."""
        return not self.passed and self.last_verdict == "unavailable"


@dataclass
class Progress:
    """The content of the file: exercises by id ("01.2"), and the letter chosen for each question ("01.a")."""

    exercises: dict[str, ExerciseProgress] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)

    def of(self, exercise_id: str) -> ExerciseProgress:
        """The exercise's record; a fresh one if it was never tried."""
        return self.exercises.get(exercise_id, ExerciseProgress())


class ProgressStore:
    """The progress kept in the folder `work`. Every method reads the file anew: other processes write it too.

    Raises CourseError when the folder cannot be written, or a newer edition of the course wrote the file.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.path = work / "progress.json"
        self.backup = work / "progress.bak.json"

    def read(self) -> Progress:
        """What is recorded. A damaged or lost file is restored first, and a sentence printed about it."""
        try:
            return _parse(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and not self.backup.exists():
                return Progress()  # nothing was done yet, and nothing is made
            with self._locked():
                return self._load()
        except OSError as error:
            raise CourseError(
                f"{self.path} cannot be read ({error.strerror}): see what is in its place."
            ) from error

    def record_attempt(self, exercise_id: str, verdict: str, source: str) -> ExerciseProgress:
        """Count an attempt that ended in a verdict of kind `verdict`."""
        passed = verdict == "passed"

        def change(old: ExerciseProgress) -> ExerciseProgress:
            return replace(
                old,
                passed=old.passed or passed,
                attempts=old.attempts + 1,
                failures=old.failures + (not passed),
                last_verdict=verdict,
                last_source=source,
                passed_at=old.passed_at or (_now() if passed else ""),
            )

        return self._change(exercise_id, change)

    def record_verdict(self, exercise_id: str, verdict: str) -> ExerciseProgress:
        """Remember the kind of the last verdict, where it is not of an attempt that counts."""
        return self._change(exercise_id, lambda old: replace(old, last_verdict=verdict))

    def record_hint(self, exercise_id: str, most: int) -> ExerciseProgress:
        """Count one more hint as given, of `most` that there are."""
        return self._change(exercise_id, lambda old: replace(old, hints=min(old.hints + 1, most)))

    def record_solution_seen(self, exercise_id: str) -> ExerciseProgress:
        """Remember that the solution was read."""
        return self._change(exercise_id, lambda old: replace(old, solution_seen=True))

    def record_choice(self, question_id: str, letter: str) -> None:
        """Remember the learner's prediction."""
        with self._locked():
            progress = self._load()
            progress.questions[question_id] = letter
            self._save(progress)

    def _change(
        self, exercise_id: str, change: Callable[[ExerciseProgress], ExerciseProgress]
    ) -> ExerciseProgress:
        with self._locked():
            progress = self._load()
            progress.exercises[exercise_id] = change(progress.of(exercise_id))
            self._save(progress)
        return progress.exercises[exercise_id]

    # ---- the file; call with the lock held --------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with open(self.work / ".progress.lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                except OSError:
                    pass  # a file system without locks (some network homes): work without one
                yield
        except OSError as error:
            raise CourseError(
                f"your progress cannot be written to {self.work} ({error.strerror}): make that folder"
                " writable, or name another in the environment variable COURSE_WORK."
            ) from error

    def _load(self) -> Progress:
        try:
            return _parse(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._restore_lost() if self.backup.exists() else Progress()
        except ValueError:
            return self._mend()

    def _save(self, progress: Progress) -> None:
        if self.path.exists():
            write_text(self.backup, self.path.read_text(encoding="utf-8"))
        write_text(self.path, _as_text(progress))

    def _mend(self) -> Progress:
        number = 1
        while (aside := self.work / f"progress.damaged-{number}.json").exists():
            number += 1
        # a copy: whatever happens now, no moment is without a progress.json
        shutil.copyfile(self.path, aside)
        return self._restore(f"{self.path.name} was damaged: it is now {aside.name}, and")

    def _restore_lost(self) -> Progress:
        remedy = f"to begin anew, delete {self.backup.name} with it"
        return self._restore(f"{self.path.name} was gone ({remedy}):")

    def _restore(self, event: str) -> Progress:
        """Write what the backup and the stored answers tell."""
        try:
            progress, source = _parse(self.backup.read_text(encoding="utf-8")), "its backup"
        except (OSError, ValueError):
            progress, source = Progress(), "the answers stored beside it"
        for exercise_id in stored_answers(self.work):
            known = progress.of(exercise_id)
            if not known.passed:  # a stored answer has passed, whatever the backup says
                progress.exercises[exercise_id] = replace(
                    known, passed=True, attempts=known.attempts + 1, last_verdict="passed", passed_at=_now()
                )
        write_text(self.path, _as_text(progress))
        restored = (
            f"what you had done was restored from {source}"
            if progress != Progress()
            else "nothing could be restored"
        )
        print(f"{event} {restored}.")
        return progress


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _as_text(progress: Progress) -> str:
    return json.dumps({"version": VERSION, **asdict(progress)}, ensure_ascii=False, indent=1) + "\n"


def _parse(text: str) -> Progress:
    """Raises ValueError if the text is anything else than what `_as_text` makes."""
    data = json.loads(text)
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise ValueError("not a progress file")
    if data["version"] > VERSION:
        raise CourseError("progress.json was written by a newer edition of this course: update the course.")
    exercises, questions = data.get("exercises"), data.get("questions")
    if not isinstance(exercises, dict) or not isinstance(questions, dict):
        raise ValueError("not a progress file")
    for entry in exercises.values():
        for known in fields(ExerciseProgress):
            if not isinstance(entry, dict) or type(entry.get(known.name)) is not type(known.default):
                raise ValueError(f"{known.name} is missing or of the wrong type")
    if not all(isinstance(letter, str) for letter in questions.values()):
        raise ValueError("a choice is no letter")
    names = [known.name for known in fields(ExerciseProgress)]
    return Progress(
        {key: ExerciseProgress(**{n: entry[n] for n in names}) for key, entry in exercises.items()}, questions
    )
