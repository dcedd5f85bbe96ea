"""One replica as its front sees it: something to send to, that puts what it says into the front's inbox.

Two threads do the waiting, so that the front never blocks on a replica that is slow or stopped, and a Ctrl-C in the
front's thread never cuts a message in two. Invariant: everything that a replica has said stands in the inbox before
the None that says that it is gone; after that nothing comes.

vLLM: the sockets and threads of `MPClient` in `vllm/v1/engine/core_client.py`, `CoreEngineProcManager`.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from course_lib.parallel.child_process import PATIENCE_S, ChildProcess

# What replicas say: (replica, message); (replica, None): it is gone; None: somebody wants the front to wake up.
FrontInbox = queue.SimpleQueue


class ReplicaLink(Protocol):
    """Attributes:
    name: what a person would look for: "process 1234".
    gone: set when it is.
    """

    name: str
    gone: threading.Event

    def send(self, message: object) -> None:
        """Send, now or soon; never waits. Nothing happens if the replica is gone."""
        ...

    def tell_to_end(self) -> None:
        """Hang up. Idempotent."""
        ...

    def end(self, patience_s: float = PATIENCE_S) -> str:
        """Wait until it is gone, and insist. Returns how it ended: "was killed by SIGKILL"."""
        ...


class ProcessLink:
    """A replica in a process on this machine; it is yet to be sent its configuration."""

    def __init__(self, index: int, inbox: FrontInbox, environment: Mapping[str, str]) -> None:
        self._process = ChildProcess("course_lib.engine.replica_process", [f"EngineCore_DP{index}"], environment)
        self.name = f"process {self._process.pid}"
        self.gone = threading.Event()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        connection = self._process.connection
        start_thread(receive_all, connection.recv_bytes, index, inbox, self._outbox, self.gone)
        start_thread(send_all, connection.send_bytes, self._outbox)

    def send(self, message: object) -> None:
        self._outbox.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def tell_to_end(self) -> None:
        self._process.tell_to_end()

    def end(self, patience_s: float = PATIENCE_S) -> str:
        return self._process.end(patience_s)


def start_thread(function: Callable[..., None], *args: Any) -> None:
    threading.Thread(target=function, args=args, name="replica-link", daemon=True).start()


def receive_all(
    receive: Callable[[], bytes],
    index: int,
    inbox: FrontInbox,
    outbox: queue.SimpleQueue[bytes | None],
    gone: threading.Event,
) -> None:
    """Until `receive` raises EOFError or OSError."""
    try:
        while True:
            inbox.put((index, pickle.loads(receive())))
    except (EOFError, OSError):
        gone.set()
        inbox.put((index, None))
        outbox.put(None)


def send_all(send: Callable[[bytes], None], outbox: queue.SimpleQueue[bytes | None]) -> None:
    """Until the outbox yields None, or `send` raises OSError."""
    try:
        while (message := outbox.get()) is not None:
            send(message)
    except OSError:  # it is gone; the other thread says so
        pass
