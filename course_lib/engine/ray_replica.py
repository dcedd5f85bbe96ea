"""Replicas in Ray actors: the same replica as in a process, on any machine of a cluster.

An actor runs the replica in a thread of its own. Two other threads of it serve the front: one takes messages in, in
the order in which they were sent, the other holds a call of the front's until there is something to say. An actor may
die with something said and not fetched; to the front that was never said, and another replica says it again.

vLLM: `CoreEngineActorManager` in `vllm/v1/engine/utils.py` (`data_parallel_backend="ray"`).
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from course_lib.bootstrap.process import usable_cores
from course_lib.config import EngineConfig
from course_lib.engine.replica_link import FrontInbox, receive_all, send_all, start_thread
from course_lib.executor.ray_executor import connected_ray
from course_lib.parallel.child_process import PATIENCE_S, Inbox

_PLACEMENT_S = 60.0  # for resources that others hold at present
_TELL, _HEAR = "tell", "hear"  # the actor's concurrency groups, of one thread each


class ReplicaActor:
    """What runs in an actor."""

    def __init__(self) -> None:
        self._inbox: Inbox = Inbox()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self, num_threads: int) -> None:
        """Be a replica from now on."""
        import torch

        # Ray has set OMP_NUM_THREADS to the number of CPUs that the actor asked for.
        torch.set_num_threads(num_threads)
        threading.Thread(target=self._run, name="replica", daemon=True).start()

    def _run(self) -> None:
        from course_lib.engine.replica_process import run_replica

        try:
            run_replica(self._inbox, self._outbox.put)
        finally:
            self._outbox.put(None)

    def describe(self) -> tuple[str, int]:
        """The node's address and this process's number."""
        import ray

        return ray.util.get_node_ip_address(), os.getpid()

    def tell(self, message: bytes | None) -> None:
        """A message for the replica; None: end."""
        self._inbox.put(message)

    def hear(self) -> list[bytes | None]:
        """Wait until the replica has said something, and return all that it has. The last of all is None."""
        said = [self._outbox.get()]
        with suppress(queue.Empty):
            while True:
                said.append(self._outbox.get_nowait())
        return said


class RayLink:
    """See `replica_link.ReplicaLink`."""

    def __init__(self, actor: Any, name: str, index: int, inbox: FrontInbox) -> None:
        self.name = name
        self.gone = threading.Event()
        self._actor = actor
        self._how: list[str] = []
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        tell = actor.tell.options(concurrency_group=_TELL).remote
        start_thread(receive_all, _hear(actor, self._how).__next__, index, inbox, self._outbox, self.gone)
        start_thread(send_all, tell, self._outbox)

    def send(self, message: object) -> None:
        self._outbox.put(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def tell_to_end(self) -> None:
        import ray

        if not self.gone.is_set() and ray.is_initialized():
            with suppress(ray.exceptions.RayError):
                self._actor.tell.options(concurrency_group=_TELL).remote(None)

    def end(self, patience_s: float = PATIENCE_S) -> str:
        import ray

        self.gone.wait(patience_s)
        if ray.is_initialized():
            ray.kill(self._actor)
        return self._how[0] if self._how else "has ended"


def _hear(actor: Any, how: list[str]) -> Iterator[bytes]:
    """What the replica says, until it raises EOFError; `how` it ended is put down before."""
    import ray

    while True:
        try:
            said = ray.get(actor.hear.options(concurrency_group=_HEAR).remote())
        except Exception as error:  # RayError, or anything if Ray itself is being shut down
            how.append(f"has ended ({str(error).splitlines()[0].rstrip('.')})")
            raise EOFError from None
        for message in said:
            if message is None:
                raise EOFError
            yield message


def join_cluster(num_cpus: int) -> str:
    """Connect to a Ray with so many CPUs; returns this machine's address in it."""
    import ray

    connected_ray(num_cpus, 'data_parallel_backend="ray"')
    return ray.util.get_node_ip_address()


def place_replicas(configs: Sequence[EngineConfig], inbox: FrontInbox) -> list[RayLink]:
    """One actor for each replica, wherever the cluster has room; each is yet to be sent its configuration.

    Raises ValueError if the cluster is too small.
    """
    import ray

    parallel = configs[0].parallel
    # With this backend for ranks, too, they are actors of their own and bring what they need.
    ranks = 1 if parallel.backend == "ray" else parallel.ranks_per_replica
    needs = {"CPU": ranks, "GPU": ranks if configs[0].device == "cuda" and parallel.backend != "ray" else 0}
    for resource, each in needs.items():
        total = ray.cluster_resources().get(resource, 0)
        if total < each * len(configs):
            raise ValueError(
                f'data_parallel_backend="ray": {len(configs)} replicas need {each} {resource} each, and Ray has '
                f"{total:g}: start Ray with more, or lower data_parallel_size"
            )
    actor_class = ray.remote(concurrency_groups={_TELL: 1, _HEAR: 1})(ReplicaActor)
    actors = [actor_class.options(num_cpus=needs["CPU"], num_gpus=needs["GPU"]).remote() for _ in configs]
    try:
        where = ray.get([actor.describe.remote() for actor in actors], timeout=_PLACEMENT_S)
        neighbours = Counter(address for address, _ in where)
        for actor, (address, _) in zip(actors, where, strict=True):
            actor.start.remote(max(1, usable_cores() // neighbours[address]))
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            raise ValueError(
                f"Ray has no room for {len(configs)} actors with {needs} each: end others, or wait for them"
            ) from error
        raise
    return [
        RayLink(actor, f"process {pid} on {address}", index, inbox)
        for index, (actor, (address, pid)) in enumerate(zip(actors, where, strict=True))
    ]
