"""Processes under torchrun that a notebook talks to.

`torchrun(3)` starts them once; `ranks.call(function)` then runs a function of the notebook on all of them and shows
what each prints. A script would do as well, but every experiment would pay for three starts of Python and torch.

Invariant: the processes end with the `Ranks` object, with the notebook's kernel, and after a call that failed or was
interrupted, since then nobody knows which of them waits for whom.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CourseError
from course_lib.teaching.recording.rank_loop import ADDRESS, KEY

PATIENCE_S = 3.0  # with the other ranks, once one has failed; with processes that were told to end
LAG_S = 30.0  # with the other ranks, once one has returned
AGAIN = "Run the cell with torchrun(…) again for new ones, then go on here."


class RanksError(CourseError):
    """The ranks do not start, or a call on them failed."""


class Ranks:
    """`size` processes, numbered from 0. Made by `torchrun`."""

    def __init__(self, connections: list[Connection], end: Callable[[], None]) -> None:
        self.size = len(connections)
        self._connections = connections
        self._end = weakref.finalize(self, end)  # also at the end of the interpreter

    def call(self, function: Callable[..., Any], *arguments: Any, time_limit_s: float = 120) -> list[Any]:
        """Run `function(*arguments)` on every rank; what each returned, by rank.

        The function is sent as source. On the ranks it sees `rank`, `world_size` and whatever earlier functions have
        declared `global`; nothing of the notebook. Lines that it prints appear as they come, those of one rank in order.

        Raises:
            RanksError: the function raised on a rank, took longer than `time_limit_s`, or on one rank much longer than
                on another. The ranks are gone then.
        """
        if not self._end.alive:
            raise RanksError(f"these ranks have ended. {AGAIN}")
        message = (function.__name__, textwrap.dedent(inspect.getsource(function)), arguments)
        try:
            for connection in self._connections:
                connection.send(message)
            return self._collect(time.monotonic() + time_limit_s)
        except BaseException as error:
            self.close()
            if isinstance(error, EOFError | OSError):
                raise RanksError(f"a rank has ended in the middle of a call, and the others with it. {AGAIN}") from error
            raise

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._end()

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        while len(results) + len(failed) < self.size:
            waiting = {one: rank for rank, one in enumerate(self._connections) if rank not in results | failed}
            ready = wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]
                kind, value = connection.recv()
                if kind == "said":
                    print(f"rank {rank} | {value}", flush=True)
                elif kind == "returned":
                    results[rank] = value
                    deadline = min(deadline, time.monotonic() + LAG_S)  # others may wait for what it did not join
                else:
                    failed[rank] = value
                    deadline = min(deadline, time.monotonic() + PATIENCE_S)  # others may wait for this one for ever
        if failed:
            rank, trace = min(failed.items())
            raise RanksError(f"on rank {rank} of {self.size}:\n{trace}The ranks have been ended. {AGAIN}")
        if len(results) < self.size:
            late = ", ".join(str(rank) for rank in range(self.size) if rank not in results)
            done = ", ".join(map(str, sorted(results)))
            why = f" Rank {done} has returned: has it left out what the others wait for?" if results else ""
            raise RanksError(f"no answer in time from rank {late}.{why} The ranks have been ended. {AGAIN}")
        return [results[rank] for rank in range(self.size)]


def torchrun(size: int, *, time_limit_s: float = 120) -> Ranks:
    """Start `size` processes on this machine as `torchrun --nproc-per-node` does, one thread each.

    Raises RanksError, with what the launcher printed, if they do not all come.
    """
    folder = Path(tempfile.mkdtemp(prefix="ranks"))
    key = secrets.token_bytes(16)
    listener = Listener(str(folder / "notebook"), family="AF_UNIX", backlog=size, authkey=key)
    path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {ADDRESS: listener.address, KEY: key.hex(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    with (folder / "launcher.txt").open("w") as said:
        launcher = subprocess.Popen(
            [sys.executable, *command, "-m", "course_lib.teaching.recording.rank_loop"],
            stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment,
            start_new_session=True,  # a notebook's interrupt is for the kernel alone
        )  # fmt: skip
    connections: dict[int, Connection] = {}
    pids: list[int] = []

    def end() -> None:
        _end(launcher, connections, pids, folder)

    try:
        try:
            _accept(listener, launcher, size, connections, pids, time.monotonic() + time_limit_s)
        finally:
            listener.close()  # before `end` removes its socket
    except BaseException as error:
        text = (folder / "launcher.txt").read_text(errors="replace")[-2000:]
        end()
        if isinstance(error, TimeoutError):
            raise RanksError(f"{len(pids)} of {size} processes came. The launcher said:\n{text}") from None
        raise
    return Ranks([connections[rank] for rank in range(size)], end)


def _accept(
    listener: Listener, launcher: subprocess.Popen, size: int, connections: dict[int, Connection], pids: list[int],
    deadline: float,
) -> None:  # fmt: skip
    """Wait for every rank. TimeoutError at the deadline, or when the launcher has ended."""
    arrived: list[Connection] = []

    def accept() -> None:
        with contextlib.suppress(OSError, EOFError):  # the listener was closed
            while len(arrived) < size:
                arrived.append(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    while len(pids) < size:
        if time.monotonic() > deadline or launcher.poll() is not None:
            raise TimeoutError
        time.sleep(0.05)
        for connection in arrived[len(pids) :]:
            rank, pid = connection.recv()
            connections[rank] = connection
            pids.append(pid)


def _end(launcher: subprocess.Popen, connections: dict[int, Connection], pids: list[int], folder: Path) -> None:
    for connection in connections.values():
        connection.close()  # at which every rank ends
    try:
        launcher.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(PATIENCE_S)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.kill()
        launcher.wait()
    for file in folder.glob("*"):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
