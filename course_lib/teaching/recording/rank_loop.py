"""What each process under torchrun runs for a notebook: take a function, call it, send back what it said and returned.

Functions live in one namespace that stays from call to call, so that a model which one of them makes is there for the
next. Invariant: the process ends when the notebook's connection does, also in the middle of a collective.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import queue
import threading
import traceback
from multiprocessing.connection import Client, Connection
from typing import Any

ADDRESS, KEY = "COURSE_RANKS_ADDRESS", "COURSE_RANKS_KEY"  # in the environment


def serve_notebook() -> None:
    """Connect, and call what comes until the notebook hangs up."""
    connection = Client(os.environ[ADDRESS], authkey=bytes.fromhex(os.environ[KEY]))
    rank = int(os.environ["RANK"])
    connection.send((rank, os.getpid()))
    names: dict[str, Any] = {"__name__": "__main__", "rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    calls: queue.SimpleQueue[tuple[str, str, tuple]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, calls), daemon=True).start()
    while True:
        name, source, arguments = calls.get()
        said = _Said(connection)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            reply = _call(names, name, source, arguments)
        connection.send(reply)


def _listen(connection: Connection, calls: queue.SimpleQueue) -> None:
    try:
        while True:
            calls.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # the main thread may be waiting for a rank that has gone already


def _call(names: dict[str, Any], name: str, source: str, arguments: tuple) -> tuple[str, Any]:
    file = f"<{name} of the notebook>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    try:
        exec(compile(source, file, "exec"), names)
        return "returned", names[name](*arguments)
    except Exception as error:
        inner = error.__traceback__.tb_next  # without this module's own lines
        return "raised", "".join(traceback.format_exception(type(error), error, inner))


class _Said(io.TextIOBase):
    """Sends text on as soon as a line is complete."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._connection.send(("said", line))
        return len(text)


if __name__ == "__main__":
    serve_notebook()
