"""The executor with one Ray actor per rank: on this machine, or on several.

The actors are placed by a placement group with one bundle per rank; neighbouring ranks, which talk most, come to lie
on the same node. Rank 0's node serves the store where the ranks meet. Calls are Ray tasks, which an actor carries out
in the order in which they were sent.

Uses the Ray that this process is connected to. If there is none: the cluster that RAY_ADDRESS names, or a Ray on this
machine for as long as this process lives (`course_lib.entrypoints.ray_local` starts one that is quieter).

vLLM: `vllm/v1/executor/ray_executor.py`, `ray_utils.py`.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from course_lib.bootstrap.process import usable_cores
from course_lib.config import EngineConfig
from course_lib.errors import SetupError
from course_lib.executor.blame import Witness
from course_lib.executor.interrupts import uninterrupted
from course_lib.executor.portable import Failure, plain_config
from course_lib.executor.remote import Call, RemoteExecutor, worker_name
from course_lib.executor.worker import MeetingPlace, Worker, meeting_place

if TYPE_CHECKING:
    import torch.distributed as dist

_PLACEMENT_S = 60.0  # for resources that others hold at present
_HEARING_S = 2.0  # for the other ranks' side of the story
_BIG_MESSAGE = 64 << 10  # bytes: put into Ray's object store once, instead of into every task
_WATCH = "watch"  # the concurrency group of the method that answers while the worker computes


class RankActor:
    """What runs in an actor: a worker, and who looks after it."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._worker: Worker | None = None
        self._thread: int | None = None  # that carries out a call at present
        self._store: dist.TCPStore | None = None

    def describe(self) -> tuple[str, int]:
        """The node's address and this process's number."""
        import ray

        return ray.util.get_node_ip_address(), os.getpid()

    def serve_store(self, host: str) -> int:
        """Serve the ranks' meeting place, and return its port."""
        from course_lib.parallel.torch_group import open_store

        self._store = open_store(host, 0, serve=True)
        return self._store.port

    def start(self, config: EngineConfig, meeting: MeetingPlace, num_threads: int) -> None:
        """Join the other ranks and make the runner."""
        import torch

        # Ray has set OMP_NUM_THREADS to the number of CPUs that the actor asked for: one.
        torch.set_num_threads(num_threads)
        device = torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")  # Ray shows it no other
        self._worker = Worker(config, meeting.join(self._rank, device))

    def call(self, message: bytes) -> Any:
        """Carry out a pickled call. Returns its value if this rank is to answer, or its Failure."""
        method = "receive"
        self._thread = threading.get_ident()
        try:
            method, arguments, answering = pickle.loads(message)
            if isinstance(arguments, bytes):
                arguments = pickle.loads(arguments)
            target = self if method == "start" else self._worker
            value = getattr(target, method)(*arguments)
            return value if self._rank in answering else None
        except BaseException as error:
            return Failure.of(error, method)
        finally:
            self._thread = None

    def where(self) -> str:
        """The stack of the call that is being carried out; "" if there is none."""
        frame = sys._current_frames().get(self._thread)
        return "" if frame is None else "".join(traceback.format_stack(frame))


class RayExecutor(RemoteExecutor):
    """Places the actors and loads the model at construction.

    Raises SetupError if Ray is missing, ValueError if the cluster is too small.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._ray = connected_ray(len(self._ranks), 'distributed_executor_backend="ray"')
        self._names = [worker_name(config.parallel, rank) for rank in self._ranks]
        self._held: list[Any] = []  # the actors by rank, and last their placement group
        self._finalizer = weakref.finalize(self, _end_actors, self._held)
        self._pending: dict[Any, tuple[Call, int]] = {}  # Ray's reference -> call, rank
        self._failures: dict[int, Failure] = {}
        self._ended: dict[int, str] = {}
        try:
            self._place_actors(config)
            self._load(config)
        except BaseException:
            self.shutdown()
            raise

    def _place_actors(self, config: EngineConfig) -> None:
        from ray.util.placement_group import placement_group, placement_group_table
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = {"CPU": 1, "GPU": 1} if config.device == "cuda" else {"CPU": 1}
        for resource in needs:
            total = self._ray.cluster_resources().get(resource, 0)
            if total < len(self._ranks):
                raise ValueError(
                    f'distributed_executor_backend="ray": {len(self._ranks)} ranks need a {resource} each, and Ray '
                    f"has {total:g}: start Ray with more, or lower tensor_parallel_size or pipeline_parallel_size"
                )
        group = placement_group([needs] * len(self._ranks), strategy="PACK")
        self._held.append(group)
        if not group.wait(timeout_seconds=_PLACEMENT_S):
            raise ValueError(
                f"Ray has no {len(self._ranks)} bundles of {needs} to spare: end other actors and tasks, or wait "
                f"until they end"
            )
        nodes = placement_group_table(group)["bundles_to_node_id"]
        bundles = sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
        actor_class = self._ray.remote(concurrency_groups={_WATCH: 1})(RankActor)
        for rank, bundle in enumerate(bundles):
            options = actor_class.options(
                name=None, num_cpus=1, num_gpus=needs.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            )  # fmt: skip
            self._held.insert(rank, options.remote(rank))
        self._actors = self._held[:-1]

    def _load(self, config: EngineConfig) -> None:
        where = self._ray.get([actor.describe.remote() for actor in self._actors])
        self._titles = [
            f"worker rank {rank} ({self._names[rank]}, pid {pid} on {address})"
            for rank, (address, pid) in enumerate(where)
        ]
        host = where[0][0]
        port = self._ray.get(self._actors[0].serve_store.remote(host))
        meeting = meeting_place(config.parallel, host, port)
        threads = max(1, usable_cores() // max(Counter(address for address, _ in where).values()))
        self._call_all("start", plain_config(config), meeting, threads)
        self._call_all("load_model")

    # ---- calls and answers ----------------------------------------------------------------------

    def _dispatch(self, call: Call, arguments: tuple | bytes) -> None:
        message: Any = pickle.dumps((call.method, arguments, call.answering), pickle.HIGHEST_PROTOCOL)
        if len(message) > _BIG_MESSAGE:
            message = self._ray.put(message)
        with uninterrupted():  # all or none
            for rank, actor in enumerate(self._actors):
                self._pending[actor.call.remote(message)] = call, rank

    def _gather(self, call: Call) -> None:
        heard = time.monotonic()
        while not call.is_answered:
            limit = call.time_limit_s()
            left = None if limit is None else heard + limit - time.monotonic()
            if left is not None and left <= 0:
                self._lose(call, self._hear(ask=True))
            if self._listen(left):
                heard = time.monotonic()
            if self._failures or self._ended:
                deadline = time.monotonic() + _HEARING_S
                while not any(one.is_evident for one in self._hear()) and time.monotonic() < deadline:
                    self._listen(_HEARING_S / 20)
                self._lose(call, self._hear())

    def _listen(self, timeout_s: float | None) -> bool:
        """Wait until a task is over, and take in what is. False if none is."""
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        for reference in ready:
            call, rank = self._pending[reference]
            try:
                value = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._ended[rank] = f"has ended ({str(error).splitlines()[0].rstrip('.')})"
            else:
                if isinstance(value, Failure) and value.method != "call_runner":
                    self._failures.setdefault(rank, value)
                if rank in call.answering or isinstance(value, Failure):
                    call.answers[rank] = value
            del self._pending[reference]
        return bool(ready)

    # ---- the end --------------------------------------------------------------------------------

    def _hear(self, ask: bool = False) -> list[Witness]:
        stacks: Sequence[str] = self._stacks() if ask else [""] * len(self._ranks)
        return [
            Witness(
                self._titles[rank], failure=self._failures.get(rank), ended=self._ended.get(rank),
                traceback=stacks[rank], is_idle=ask and not stacks[rank],
            )  # fmt: skip
            for rank in self._ranks
        ]

    def _stacks(self) -> list[str]:
        references = [actor.where.options(concurrency_group=_WATCH).remote() for actor in self._actors]
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=_HEARING_S)
        silent = "its process does not answer\n"  # so it does not idle, either
        return [self._ray.get(one) if one in ready else silent for one in references]

    def _title(self, rank: int) -> str:
        return self._titles[rank]

    def _kill_ranks(self) -> None:
        self._end_ranks()

    def _end_ranks(self) -> None:
        self._finalizer()
        self._pending = {}


def connected_ray(num_cpus: int, asked_by: str) -> Any:
    """The module, connected to a cluster; to a new one on this machine, of so many CPUs, if there is none.

    Raises SetupError, naming the argument that `asked_by`, if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise SetupError(
            f'{asked_by} needs Ray, which is not installed here: `pip install ray`, or use "mp"'
        ) from None
    if not ray.is_initialized():
        local = {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
        ray.init(logging_level="ERROR", **({} if "RAY_ADDRESS" in os.environ else local))
    return ray


def _end_actors(held: list[Any]) -> None:
    import ray

    if not held or not ray.is_initialized():
        return
    from ray.util.placement_group import remove_placement_group

    *actors, group = held
    with suppress(Exception):  # whatever is gone already need not be ended
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
