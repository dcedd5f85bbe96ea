"""A worker process as its parent sees it: started, told, listened to, asked where it hangs, ended.

A worker has four descriptors from its parent: the ring with the messages; a socket, over which it is told where in
the ring a message stands and over which it answers; a pipe that nothing is ever written to, whose end tells it that
the parent is gone; and a nameless file for its last traceback, which faulthandler writes to even if Python cannot run
any more. None of them has a name that could be left behind.

Invariant: nothing here waits for the worker, except for the end of one that has hung up or was killed.

vLLM: `WorkerProc` and `WorkerProcHandle` in `vllm/v1/executor/multiproc_executor.py`.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from course_lib.executor.broadcast_ring import nameless_file
from course_lib.parallel.child_process import how_it_ended, start_module

NOTICE = struct.Struct("<QQQ")  # number of a call, where its message ends in the ring, the message's length
ANSWER = struct.Struct("<Q")  # length of what follows
_AT_ONCE = 1 << 18  # bytes to receive in one call
_IDLE = re.compile(r'worker_process\.py", line \d+ in wait\n')  # in what faulthandler writes
_PATIENCE_S = 5.0  # with the end of a process that has hung up


class WorkerHandle:
    """Starts worker `rank` of `num_workers`.

    Args:
        name: what it is called in messages, such as "Worker_TP1".
        ring: descriptor of the ring's memory.
        environment: of the process.
    """

    def __init__(self, name: str, rank: int, num_workers: int, ring: int, environment: dict[str, str]) -> None:
        self.rank = rank
        self.has_hung_up = False
        self._received = bytearray()
        self._socket, theirs = socket.socketpair()
        alive, self._lifeline = os.pipe()
        self._trace = nameless_file()
        passed = (theirs.fileno(), ring, alive, self._trace)
        try:
            arguments = name, rank, num_workers
            self.process = start_module("course_lib.executor.worker_process", arguments, passed, environment)
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()
            os.close(alive)
        self.title = f"worker rank {rank} ({name}, pid {self.process.pid})"

    def fileno(self) -> int:
        """Of the socket, to wait for answers; -1 when closed."""
        return self._socket.fileno()

    def notify(self, number: int, end: int, length: int, files: Sequence[int] = ()) -> None:
        """Say where the message of call `number` is: in the ring, or in the one of `files`."""
        try:
            socket.send_fds(self._socket, [NOTICE.pack(number, end, length)], files)
        except OSError:  # it has ended; whoever waits for its answer will notice
            self.has_hung_up = True

    def answers(self) -> Iterator[tuple[int, Any]]:
        """Receive what is there, without waiting, and yield each answer that is complete with its call's number.

        Sets `has_hung_up` if the worker has ended.
        """
        try:
            received = self._socket.recv(_AT_ONCE, socket.MSG_DONTWAIT)
            self.has_hung_up = not received
        except BlockingIOError:
            return
        except OSError:
            received, self.has_hung_up = b"", True
        self._received += received
        while len(self._received) >= ANSWER.size:
            (length,) = ANSWER.unpack_from(self._received)
            if len(self._received) < ANSWER.size + length:
                return
            answer = bytes(self._received[ANSWER.size : ANSWER.size + length])
            del self._received[: ANSWER.size + length]
            yield pickle.loads(answer)

    def ask_for_traceback(self) -> None:
        """Have the process write down where it is; `last_traceback` has it a moment later."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def last_traceback(self) -> str:
        """What the process has written on request, or when it crashed; "" if nothing."""
        return os.pread(self._trace, os.fstat(self._trace).st_size, 0).decode(errors="replace")

    def was_idle(self) -> bool:
        """Whether its last traceback shows it waiting for a call."""
        return _IDLE.search(self.last_traceback()) is not None

    def how_it_ended(self) -> str:
        """ "was killed by SIGKILL", "has exited with code 1"; of one that has hung up."""
        try:
            return how_it_ended(self.process.wait(timeout=_PATIENCE_S))
        except subprocess.TimeoutExpired:
            return "has closed its connection"

    def hang_up(self) -> None:
        """Tell an idle worker to end."""
        self._socket.close()

    def end(self, patience_s: float = 0.0) -> None:
        """Wait for the process to end by itself, then kill it; give back its descriptors. Idempotent."""
        try:
            self.process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        self._socket.close()
        for descriptor in (self._lifeline, self._trace):
            if descriptor >= 0:
                os.close(descriptor)
        self._lifeline = self._trace = -1
