"""All replicas of one front: started together, listened to at one place, ended together.

Invariant: whoever is in `links` was ready and is not known to be gone. No process outlives the set's `close`, which
runs at the latest when Python ends.

vLLM: `launch_core_engines`, `CoreEngineProcManager` in `vllm/v1/engine/utils.py`.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import time
from typing import Any

from course_lib.config import EngineConfig
from course_lib.engine.replica_link import FrontInbox, ProcessLink, ReplicaLink
from course_lib.engine.replica_messages import Failed, Ready
from course_lib.errors import EngineDeadError
from course_lib.executor.interrupts import uninterrupted
from course_lib.executor.portable import Failure, plain_config
from course_lib.parallel.child_process import PATIENCE_S, environment_for_one_of
from course_lib.parallel.replicas import ReplicaPlace

_OTHERS_DEATHS_S = 1.0  # how long after the first of several that fall together to wait for word of the rest
_LOCAL = "127.0.0.1"


@dataclasses.dataclass(slots=True)
class Gone:
    """Takes the place of a message."""

    how: str


class ReplicaSet:
    """Starts `config.parallel.layout.data` replicas and waits until they have loaded the model.

    Raises what a replica could not do, and EngineDeadError if one ends without a word.

    Attributes:
        links: the living, by number.
        max_model_lens: what fits each one's cache, by number.
        last_heard: when each one's last message was received, by number; `time.monotonic`.
        ends: how those that are gone ended.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.inbox: FrontInbox = FrontInbox()
        self.links: dict[int, ReplicaLink] = {}
        self.max_model_lens: dict[int, int] = {}
        self.last_heard: dict[int, float] = {}
        self.ends: list[str] = []
        self._last_words: dict[int, Failure] = {}
        self._given_up: dict[int, str] = {}
        self._owner = os.getpid()
        self._all: list[ReplicaLink] = []
        try:
            self._start(config)
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig) -> None:
        parallel = config.parallel
        over_ray = parallel.data_backend == "ray"
        host, port = _LOCAL, 0
        if over_ray:
            from course_lib.engine.ray_replica import join_cluster, place_replicas

            host = join_cluster(parallel.layout.world_size)
        if parallel.in_lock_step:
            from course_lib.parallel.torch_group import open_store

            self._store = open_store(host, 0, serve=True)  # kept as long as we live: it is the server
            port = self._store.port
        # A process of ours sees its own devices only, so it is the first on them.
        places = [ReplicaPlace(index, 0, host, port) for index in range(parallel.layout.data)]
        plain = plain_config(config)
        configs = [dataclasses.replace(plain, parallel=parallel.for_replica(place)) for place in places]
        if over_ray:
            self._all += place_replicas(configs, self.inbox)
        for index, own in enumerate(configs):
            if not over_ray:
                with uninterrupted():  # a process that is started must also be listed
                    self._all.append(ProcessLink(index, self.inbox, replica_environment(config, index)))
            self.links[index] = self._all[index]
            self.links[index].send(own)

    def _wait_until_ready(self) -> None:
        while len(self.max_model_lens) < len(self.links):
            replica, message = self.receive()
            if isinstance(message, Ready):
                self.max_model_lens[replica] = message.max_model_len
            elif replica in self._last_words:
                raise self._last_words[replica].error(f"replica {replica}")
            elif isinstance(message, Gone):
                raise EngineDeadError(f"{message.how} while the engine was starting: see what it printed")

    def receive(self, block: bool = True, timeout: float | None = None) -> tuple[int, Any]:
        """The next message of any replica, `Gone` being the last of each; (-1, None) after `wake`.

        Raises queue.Empty if there is none and we are not to wait, or no longer.
        """
        item = self.inbox.get(block, timeout)
        if item is None:
            return -1, None
        replica, message = item
        if message is None:
            link = self.links.pop(replica, None)
            if link is None:  # known
                return -1, None
            how, last_words = link.end(), self._last_words.get(replica)
            if replica in self._given_up:
                how = self._given_up[replica]
            elif last_words is not None:
                how = f"has ended: {last_words.summary.splitlines()[0].rstrip('.')}"
            message = Gone(f"replica {replica} ({link.name}) {how}")
            self.ends.append(message.how)
            return replica, message
        self.last_heard[replica] = time.monotonic()
        if isinstance(message, Failed) and message.fatal:
            self._last_words[replica] = message.failure
        return replica, message

    def give_up(self, replica: int, why: str) -> None:
        """End a replica that hangs: `receive` will tell that it is gone."""
        self._given_up[replica] = why
        self.links[replica].end(0)

    def recheck(self) -> None:
        """Have `receive` tell again who is gone: an interrupted call of it may have told nobody."""
        for replica, link in self.links.items():
            if link.gone.is_set():
                self.inbox.put((replica, None))

    def await_ends(self) -> None:
        """The rest must fall, too: give it a moment to do so by itself and say how. Then end it."""
        try:
            while self.links:
                self.receive(timeout=_OTHERS_DEATHS_S)
        except queue.Empty:
            pass
        for link in self.links.values():
            link.tell_to_end()
        self.links.clear()
        self.ends.sort(key=lambda how: "killed" not in how)  # the cause first, then those that followed

    def close(self) -> None:
        """End all. Idempotent."""
        if os.getpid() != self._owner:  # a process forked from ours: they are not its own
            return
        for link in self._all:
            link.tell_to_end()
        for replica, link in enumerate(self._all):
            link.end(PATIENCE_S if replica in self.max_model_lens else 0)  # one that is loading has nothing to end
        self._all.clear()
        self.links.clear()


def replica_environment(config: EngineConfig, index: int) -> dict[str, str]:
    """Of replica `index`: its share of this machine's processors, and of its GPUs.

    Raises ValueError if there are too few GPUs.
    """
    parallel = config.parallel
    env = environment_for_one_of(parallel.layout.world_size)
    if config.device == "cuda":
        count = parallel.ranks_per_replica
        first = index if parallel.replica is None else parallel.replica.local_rank
        visible = _visible_devices()
        own = visible[first * count : (first + 1) * count]
        if len(own) < count:
            who, remedy = f"data_parallel_size={parallel.layout.data}", "lower the size"
            if parallel.replica is not None:
                who, remedy = f"VLLM_DP_RANK_LOCAL={first}", "set it to 0 if this process sees its own GPUs only"
            raise ValueError(
                f"{who}: that replica needs {count} of this machine's GPUs from number {first * count} on, and "
                f"{len(visible)} can be seen: {remedy}"
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return env


def _visible_devices() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
