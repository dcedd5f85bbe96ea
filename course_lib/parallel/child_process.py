"""A process of ours: started without `multiprocessing`, tied to us by descriptors that it inherits.

Why not `multiprocessing`: its "spawn" imports the caller's main module again, so that scripts need a `__main__` guard
and notebooks special care; its "fork" copies threads and CUDA contexts, which do not survive it.

Invariant: no orphans. A `ChildProcess` ends when its connection does, which the operating system sees to however the
parent ends. Ctrl-C is not for children: their parent decides what that means.

vLLM: `CoreEngineProcManager` in `vllm/v1/engine/utils.py`.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from course_lib.bootstrap.places import child_environment
from course_lib.bootstrap.process import usable_cores

PATIENCE_S = 5.0  # with a child that was told to end, before it is killed
_LOOK_AT_PARENT_S = 2.0


def start_module(
    module: str, arguments: Sequence[object], descriptors: Sequence[int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """`python -m module arguments… descriptors…`, which inherits the descriptors and nothing else."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *map(str, [*arguments, *descriptors])],
        env=dict(environment),
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=2,  # our standard error: standard output is for what this program has to say
        start_new_session=True,  # Ctrl-C is for us
    )


def environment_for_one_of(num_processes: int) -> dict[str, str]:
    """What children are given: the modules that this process can import, and their share of its cores."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // num_processes))
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    return child_environment(OMP_NUM_THREADS=threads, PYTHONPATH=paths)


def how_it_ended(code: int) -> str:
    """An exit code in words: "was killed by SIGKILL", "has exited with code 1"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"has exited with code {code}"


class ChildProcess:
    """Runs `python -m module arguments…`, the last argument being what `listen_to_parent` takes.

    Attributes:
        connection: to the child's; `recv_bytes` raises EOFError or OSError once the child has ended, after everything
            it had sent.
    """

    def __init__(self, module: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        try:
            self._process = start_module(module, arguments, [theirs.fileno()], environment)
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.connection = Connection(os.dup(self._socket.fileno()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell_to_end(self) -> None:
        """Hang up; `end` waits for the effect. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # unlike `close`, this wakes a thread that is receiving
        except OSError:  # it has ended already
            pass

    def end(self, patience_s: float = PATIENCE_S) -> str:
        """Wait for a child that has ended or was told to, and insist. Returns how it ended, in words."""
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return how_it_ended(code)


Inbox = queue.SimpleQueue  # of bytes, each one message; None when the parent is gone or has hung up


def listen_to_parent(descriptor: str) -> tuple[Inbox, Connection]:
    """In the child, at once: a queue of what the parent sends, and where to send to it.

    After the None, the process has a moment to end in order; then it is ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(descriptor))
    inbox: Inbox = Inbox()
    threading.Thread(target=_listen, args=(connection, inbox, os.getppid()), daemon=True).start()
    return inbox, connection


def _listen(connection: Connection, inbox: Inbox, parent: int) -> None:
    try:
        while True:
            # A process that the parent has forked holds its end open, too: so look at who the parent is now and then.
            while not connection.poll(_LOOK_AT_PARENT_S):
                if os.getppid() != parent:
                    raise EOFError
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        inbox.put(None)
        time.sleep(PATIENCE_S)
        os._exit(1)
