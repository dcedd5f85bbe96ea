"""The program that a worker process runs: `python -m course_lib.executor.worker_process`.

Receives calls of the worker's methods, one after the other, and answers those that are answered by its rank. Ends
when its parent hangs up, and at once when its parent is gone. Ctrl-C is not for it. What it prints goes to standard
error, each line behind the worker's name.

vLLM: `WorkerProc.worker_main` and `worker_busy_loop` in `vllm/v1/executor/multiproc_executor.py`.
"""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from course_lib.executor.broadcast_ring import RingReader, read_file
from course_lib.executor.portable import Failure
from course_lib.executor.worker_handle import ANSWER, NOTICE

if TYPE_CHECKING:
    from course_lib.config import EngineConfig
    from course_lib.executor.worker import MeetingPlace, Worker

_LOOK_AT_PARENT_S = 2.0


class NamedLines(io.RawIOBase):
    """Bytes to descriptor 2, each line in one piece behind `name`."""

    def __init__(self, name: str) -> None:
        self._prefix = f"({name} pid={os.getpid()}) ".encode()
        self._line = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, data: bytes) -> int:
        *lines, self._line = (self._line + bytes(data)).split(b"\n")
        for line in lines:
            os.write(2, b"%s%s\n" % (self._prefix, line))
        return len(data)


class CallChannel:
    """The worker's side of ring and socket."""

    def __init__(self, socket_fd: int, ring_fd: int, rank: int, num_workers: int) -> None:
        self._socket = socket.socket(fileno=socket_fd)
        self._ring = RingReader(ring_fd, rank, num_workers)

    def wait(self) -> tuple[int, Callable[[], Any]] | None:
        """Wait for the next call: its number, and what reads it. None: the parent has hung up."""
        try:
            notice, files, _, _ = socket.recv_fds(self._socket, NOTICE.size, 1)
        except OSError:
            return None
        if not notice:
            return None
        number, end, length = NOTICE.unpack(notice)
        if files:
            return number, partial(read_file, files[0], length)
        return number, partial(self._ring.read, end, length)

    def answer(self, number: int, value: Any) -> None:
        """Send the result of a call, unless the parent has hung up."""
        packed = pickle.dumps((number, value), pickle.HIGHEST_PROTOCOL)
        with suppress(OSError):
            self._socket.sendall(ANSWER.pack(len(packed)) + packed)


def serve(channel: CallChannel, rank: int) -> None:
    """Carry out calls until the parent hangs up. A call that fails is answered by every rank that it fails on."""
    worker: Worker | None = None
    while (call := channel.wait()) is not None:
        number, read = call
        method = "receive"
        try:
            method, arguments, answering = read()
            if isinstance(arguments, bytes):
                arguments = pickle.loads(arguments)
            if method == "start":
                worker = start(rank, *arguments)
                value = None
            else:
                value = getattr(worker, method)(*arguments)
            if rank in answering:
                channel.answer(number, value)
        except BaseException as error:
            channel.answer(number, Failure.of(error, method))
    if worker is not None:
        worker.close()


def start(rank: int, config: EngineConfig, meeting: MeetingPlace, first_device: int) -> Worker:
    """Join the other ranks and make the runner; on a GPU, on this rank's own."""
    import torch

    from course_lib.executor.worker import Worker

    device = torch.device("cpu")
    if config.device == "cuda":
        device = torch.device("cuda", first_device + rank)
        torch.cuda.set_device(device)
    return Worker(config, meeting.join(rank, device))


def _end_with_parent(lifeline: int, parent: int) -> None:
    # A process that the parent has forked holds the pipe open, too: so look at who the parent is now and then.
    while not select.select([lifeline], [], [], _LOOK_AT_PARENT_S)[0]:
        if os.getppid() != parent:
            break
    os._exit(1)


def main(name: str, *numbers: str) -> None:
    rank, num_workers, socket_fd, ring_fd, lifeline, trace_fd = map(int, numbers)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable(trace_fd)
    # Only the thread that the signal finds, which is the main one.
    faulthandler.register(signal.SIGUSR1, trace_fd, all_threads=False)
    sys.stdout = sys.stderr = io.TextIOWrapper(NamedLines(name), "utf-8", "replace", write_through=True)
    watch = threading.Thread(target=_end_with_parent, args=(lifeline, os.getppid()), daemon=True)
    watch.start()
    serve(CallChannel(socket_fd, ring_fd, rank, num_workers), rank)
    os._exit(0)  # what libraries do at the end of Python takes long, and sometimes waits for a rank that is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
