"""One engine under comparison: a process that is started, given work, timed and ended.

Invariants: a side runs only while it is timed, for an engine that waits for work by spinning would slow the others
down; `close` leaves no process behind, whatever state the engine is in, and the context manager calls it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any

import psutil

from course_lib.bench.workloads import WorkItem, output_tokens
from course_lib.errors import CourseError

LAST_WORDS = 12  # lines of a failed engine's log
PATIENCE_S = 5  # for a process that was asked to end


class PeerError(CourseError):
    """An engine that did not start, or stopped, or produced something else than it was asked for."""


class Side:
    """`name` as the table shows it; `command` starts a worker, without the worker's own two arguments."""

    def __init__(
        self, name: str, command: Sequence[str], environment: dict[str, str], options: dict[str, Any]
    ) -> None:
        self.name = name
        self.peak_bytes = 0
        reading, writing = os.pipe()
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, str(writing), json.dumps(options)], env=environment, pass_fds=(writing,),
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, text=True,
            start_new_session=True,  # Ctrl-C is for the comparison, which ends its sides in order
        )  # fmt: skip
        os.close(writing)
        self._answers = os.fdopen(reading)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cold_start(self, item: WorkItem) -> float:
        """Seconds from the start of the process to the first token of its first request. Call it first."""
        self._answer()  # loaded
        self.run([WorkItem(item.prompt_token_ids, 1)])
        return time.perf_counter() - self.started

    def run(self, items: list[WorkItem]) -> float:
        """Seconds to serve all items. Raises PeerError if it produced too few tokens, or failed."""
        message = {"items": [(item.prompt_token_ids, item.max_tokens) for item in items]}
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it has stopped") from None
        answer = self._answer()
        if answer["tokens"] != output_tokens(items):
            raise self._failure(f"{answer['tokens']} tokens produced, {output_tokens(items)} asked for")
        self._note_memory()
        self._signal(signal.SIGSTOP)
        return float(answer["seconds"])

    def close(self) -> None:
        """End the process and those it started."""
        tree = self._tree()
        self._signal(signal.SIGCONT)
        for ask in (psutil.Process.terminate, psutil.Process.kill):
            for process in tree:
                try:
                    ask(process)
                except psutil.NoSuchProcess:
                    continue
            _, tree = psutil.wait_procs(tree, timeout=PATIENCE_S)
        self._process.wait()
        self._process.stdin.close() if self._process.stdin else None
        self._answers.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise self._failure("it has stopped")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(answer["error"])
        return answer

    def _failure(self, what: str) -> PeerError:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-LAST_WORDS:]
        return PeerError("\n".join([f"{self.name}: {what}. The end of its log:", *(f"  {line}" for line in lines)]))

    def _tree(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _note_memory(self) -> None:
        """Proportional set size of all its processes: pages that two of them share count once."""
        total = 0
        for process in self._tree():
            try:
                memory = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            total += getattr(memory, "pss", memory.rss)
        self.peak_bytes = max(self.peak_bytes, total)
