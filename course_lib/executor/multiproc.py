"""The executor with one worker process per rank.

A call of a worker's method is pickled once, into memory that all workers share, and each is sent a short notice
over its socket; so nobody polls. Calls are numbered, and answers carry the number: an answer that nobody waits for
any more, because its step was interrupted, is dropped.

Invariants: every worker is sent the same calls in the same order, Ctrl-C or not; no process outlives the executor, or
this process, however that ends.

vLLM: `vllm/v1/executor/multiproc_executor.py`.
"""

from __future__ import annotations

import os
import pickle
import select
import time
import weakref
from typing import Any

from course_lib.config import EngineConfig
from course_lib.errors import WorkerDiedError
from course_lib.executor.blame import Witness
from course_lib.executor.broadcast_ring import RingWriter, nameless_file
from course_lib.executor.interrupts import uninterrupted
from course_lib.executor.portable import Failure, plain_config
from course_lib.executor.remote import Call, RemoteExecutor, worker_name
from course_lib.executor.worker import meeting_place
from course_lib.executor.worker_handle import WorkerHandle
from course_lib.parallel.child_process import environment_for_one_of
from course_lib.parallel.torch_group import open_store

_HOST = "127.0.0.1"
_END_PATIENCE_S = 1.0  # with idle workers that are told to end
_HEARING_S = 1.0  # for the other workers' side of the story
_LONGEST_WAIT_S = 3600.0  # for one look at the sockets


class MultiprocExecutor(RemoteExecutor):
    """Starts the workers and loads the model at construction."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        first_device = _first_device(config)
        # Whoever waits for a call keeps it; an answer to a call that is gone is not wanted any more.
        self._calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
        self._num_calls = 0
        self._failures: dict[int, Failure] = {}  # by rank: of calls after which nothing can go on
        self._poll = select.poll()
        self._workers: list[WorkerHandle] = []
        self._ring = RingWriter(len(self._ranks))
        self._finalizer = weakref.finalize(self, _end_workers, os.getpid(), self._workers, self._ring)
        try:
            self._store = open_store(_HOST, 0, serve=True)
            self._start_workers(config)
            meeting = meeting_place(config.parallel, _HOST, self._store.port)
            self._call_all("start", plain_config(config), meeting, first_device)
            self._call_all("load_model")
        except BaseException:
            self.shutdown()
            raise

    def _start_workers(self, config: EngineConfig) -> None:
        environment = environment_for_one_of(len(self._ranks))
        for rank in self._ranks:
            name = worker_name(config.parallel, rank)
            with uninterrupted():  # a process that is started must also be listed
                worker = WorkerHandle(name, rank, len(self._ranks), self._ring.descriptor, environment)
                self._workers.append(worker)
            self._poll.register(worker, select.POLLIN)

    def check_health(self) -> None:
        """Raise EngineDeadError if a worker is gone. May be called by any thread."""
        super().check_health()
        for worker in self._workers:
            if worker.process.poll() is not None:
                raise WorkerDiedError(f"{worker.title} {worker.how_it_ended()}: make a new engine")

    # ---- calls and answers ----------------------------------------------------------------------

    def _dispatch(self, call: Call, arguments: tuple | bytes) -> None:
        message = pickle.dumps((call.method, arguments, call.answering), pickle.HIGHEST_PROTOCOL)
        with uninterrupted():
            self._num_calls += 1
            self._calls[self._num_calls] = call
            end = self._ring.write(message)
            files = [] if end is not None else [nameless_file(message)]
            for worker in self._workers:
                worker.notify(self._num_calls, end or 0, len(message), files)
            for file in files:
                os.close(file)

    def _gather(self, call: Call) -> None:
        heard = time.monotonic()
        while not call.is_answered:
            limit = call.time_limit_s()
            left = _LONGEST_WAIT_S if limit is None else heard + limit - time.monotonic()
            if left <= 0:
                self._ask_for_tracebacks()
                self._lose(call, self._hear())
            if self._listen(left):
                heard = time.monotonic()
            if self._is_in_trouble():
                deadline = time.monotonic() + _HEARING_S
                while not any(one.is_evident for one in self._hear()) and time.monotonic() < deadline:
                    self._listen(_HEARING_S / 20)
                self._lose(call, self._hear())

    def _listen(self, timeout_s: float) -> bool:
        """Wait until a worker says something or ends, and take it in. False if none did."""
        ready = {descriptor for descriptor, _ in self._poll.poll(timeout_s * 1000)}
        for worker in self._workers:
            if worker.fileno() in ready:
                with uninterrupted():  # what is received must also be taken in
                    for number, value in worker.answers():
                        self._take_in(worker.rank, number, value)
        return bool(ready)

    def _take_in(self, rank: int, number: int, value: Any) -> None:
        if isinstance(value, Failure) and value.method != "call_runner":
            self._failures.setdefault(rank, value)
        call = self._calls.get(number)
        if call is not None:
            call.answers[rank] = value

    def _is_in_trouble(self) -> bool:
        return bool(self._failures) or any(worker.has_hung_up for worker in self._workers)

    # ---- the end --------------------------------------------------------------------------------

    def _ask_for_tracebacks(self) -> None:
        for worker in self._workers:
            worker.ask_for_traceback()
        deadline = time.monotonic() + _HEARING_S
        while time.monotonic() < deadline and not all(worker.last_traceback() for worker in self._workers):
            time.sleep(_HEARING_S / 50)

    def _hear(self) -> list[Witness]:
        return [
            Witness(
                worker.title,
                failure=self._failures.get(worker.rank),
                ended=worker.how_it_ended() if worker.has_hung_up else None,
                traceback=worker.last_traceback(),
                is_idle=worker.was_idle(),
            )
            for worker in self._workers
        ]

    def _title(self, rank: int) -> str:
        return self._workers[rank].title

    def _kill_ranks(self) -> None:
        for worker in self._workers:
            worker.process.kill()

    def _end_ranks(self) -> None:
        self._finalizer()
        self._store = None


def _end_workers(owner: int, workers: list[WorkerHandle], ring: RingWriter) -> None:
    if os.getpid() != owner:
        return  # a process forked off, at its end: the workers are not its own
    for worker in workers:
        worker.hang_up()
    deadline = time.monotonic() + _END_PATIENCE_S
    for worker in workers:
        worker.end(max(0.0, deadline - time.monotonic()))
    ring.close()


def _first_device(config: EngineConfig) -> int:
    """The GPU of rank 0, among those that this process sees; its neighbours belong to the other ranks.

    Raises ValueError if there are too few.
    """
    if config.device != "cuda":
        return 0
    import torch

    ranks = config.parallel.ranks_per_replica
    place = config.parallel.replica
    first = 0 if place is None else place.local_rank * ranks
    seen = torch.cuda.device_count()
    if first + ranks > seen:
        raise ValueError(
            f"tensor_parallel_size={config.parallel.layout.tensor} times pipeline_parallel_size="
            f"{config.parallel.layout.pipeline} needs {ranks} GPUs from number {first} on, and torch sees {seen}: "
            f'lower the sizes, or use device="cpu"'
        )
    return first
