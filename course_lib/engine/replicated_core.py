"""Several engine cores behind one front: who is given a request, and what happens when one of them dies.

The front keeps its own copy of every unfinished request and appends to it what it has been told of its output: at any
moment that copy is what another replica needs to go on. When a replica's connection ends, all that it ever sent has
been read, so its unfinished requests are given to the others, which compute prompt and output so far again, as after
a preemption, and go on with the next token. A replica that is at work and says nothing for longer than a step may take
is ended, and then gone like any other. So what was told is never told again and never contradicted. (To run a
request anew from its prompt and drop what comes twice would be slower, and wrong now and then: the new run may differ
in a near-tie, and its second half would not fit the first half of the old one.) Penalties, `min_tokens`, `max_tokens`
and the user's processors see prompt and output as what they are. A request's own seed goes on as well: each of its
tokens takes a fixed number of draws, which the new replica's runner skips; requests without a seed go on with that
replica's randomness. Log-probabilities of the prompt come again, and are dropped if they were told.

Invariant: of every request each token is told once, in order, and so is its end, however many replicas die before
the last.

Replicas that share experts stand and fall together: a part of the model is gone.

vLLM: `DPLBAsyncMPClient` in `vllm/v1/engine/core_client.py`, where the death of a replica is the death of the engine.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import queue
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from course_lib.config import EngineConfig
from course_lib.core.kv_events import KVListener
from course_lib.core.messages import EngineCoreOutput
from course_lib.core.request import Request
from course_lib.engine.core import with_max_model_len
from course_lib.engine.balancer import Balancer
from course_lib.engine.coordinator import WaveCoordinator
from course_lib.engine.replica_messages import (
    AbortRequests,
    AddRequest,
    Alone,
    Answer,
    Call,
    Failed,
    News,
    Reset,
    StartWave,
    WaveComplete,
)
from course_lib.engine.replica_set import Gone, ReplicaSet
from course_lib.engine.stat_logger import StatLogger
from course_lib.errors import EngineDeadError
from course_lib.executor.portable import Failure, pack
from course_lib.parallel.config import STEP_TIME_LIMIT

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _InFlight:
    """A request as far as we have been told, and where it is."""

    request: Request
    replica: int
    prompt_logprobs_told: bool = False


class ReplicatedCore:
    """A `CoreClient` of `config.parallel.layout.data` replicas.

    Attributes:
        config: final; its `max_model_len` is what fits every replica.
        balancer: who has how much to do.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._lock_step = config.parallel.in_lock_step
        self._in_flight: dict[str, _InFlight] = {}
        self._news: list[EngineCoreOutput] = []  # received, not yet told
        self._failure: Exception | None = None  # of a replica's step; to be raised by ours
        self._dead: EngineDeadError | None = None
        self._answers: dict[int, Answer] = {}  # to the call under way, by replica
        self._num_calls = 0
        self._waves = WaveCoordinator()
        self.replicas = ReplicaSet(config)
        self._close = weakref.finalize(self, self.replicas.close)
        self.config = with_max_model_len(config, min(self.replicas.max_model_lens.values()))
        self.balancer = Balancer(config.parallel.layout.data, config.parallel.balancing)
        self._stat_loggers = {index: StatLogger(prefix=f"replica {index}: ") for index in self.replicas.links}

    # ---- requests -------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        self._check_alive()
        # A replica may have room for longer sequences than the front promises.
        request.max_tokens = min(request.max_tokens, self.config.model.max_model_len - request.num_prompt_tokens)
        entry = _InFlight(request, self._assign())
        self._in_flight[request.request_id] = entry
        self._send(entry)

    def _assign(self) -> int:
        replica = self.balancer.assign()
        if self.balancer.loads[replica] == 1:  # it had nothing to say before
            self.replicas.last_heard[replica] = time.monotonic()
        return replica

    def _send(self, entry: _InFlight) -> None:
        request, links = entry.request, self.replicas.links
        if request.sampling_params.logits_processors:
            data = pack(request, "logits_processors")
        else:
            data = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        wave, wakes = self._waves.on_request() if self._lock_step else (0, False)
        links[entry.replica].send(AddRequest(request.request_id, data, wave))
        if wakes:
            self._call_to_wave(wave, but=entry.replica)

    def _call_to_wave(self, wave: int, but: int) -> None:
        for index, link in self.replicas.links.items():
            if index != but:
                link.send(StartWave(wave))

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        by_replica: dict[int, list[str]] = {}
        for request_id in request_ids:
            entry = self._in_flight.pop(request_id, None)
            if entry is not None:
                self.balancer.release(entry.replica)
                by_replica.setdefault(entry.replica, []).append(request_id)
        for replica, ids in by_replica.items():
            if replica in self.replicas.links:
                self.replicas.links[replica].send(AbortRequests(ids))

    # ---- the loop -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._news or self._failure is not None)

    def anybody_unfinished(self, we: bool) -> bool:
        return we

    def step(self) -> list[EngineCoreOutput]:
        """Wait for news of any replica, or for `wake`, and return all there are."""
        if not self.has_work:
            return []
        if not self._news and self._failure is None and self._dead is None:
            self._handle(*self._receive())
        try:
            while True:
                self._handle(*self.replicas.receive(block=False))
        except queue.Empty:
            self._give_up_the_silent()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if not self._news:
            self._check_alive()
        news, self._news = self._news, []
        return news

    def _receive(self) -> tuple[int, Any]:
        """Wait for the next message, however long."""
        while True:
            try:
                return self.replicas.receive(timeout=self.config.parallel.step_time_limit_s / 4)
            except queue.Empty:
                self._give_up_the_silent()

    def _give_up_the_silent(self) -> None:
        """Call it when all that has come was read: who has said nothing for so long, though at work, will not."""
        limit_s = self.config.parallel.step_time_limit_s
        overdue = time.monotonic() - limit_s
        for replica in list(self.replicas.links):
            if self.balancer.loads[replica] and self.replicas.last_heard[replica] < overdue:
                limit = f"{limit_s:g} s (environment variable {STEP_TIME_LIMIT})"
                self.replicas.give_up(replica, f"has said nothing for more than {limit}, though it had work to do")

    def wake(self) -> None:
        self.replicas.inbox.put(None)

    def _handle(self, replica: int, message: Any) -> None:
        if isinstance(message, News):
            self._take_news(replica, message)
        elif isinstance(message, Gone):
            self._go_on_without(replica, message)
        elif isinstance(message, Answer):
            if message.number == self._num_calls:
                self._answers[replica] = message
        elif isinstance(message, Failed):
            if not message.fatal:  # otherwise it will be gone
                self._failure = message.failure.error(f"replica {replica}")
        elif isinstance(message, WaveComplete):
            self._waves.on_complete(message.wave)
        elif isinstance(message, Alone) and self._waves.on_alone(message.wave):
            self._call_to_wave(message.wave, but=replica)

    def _take_news(self, replica: int, news: News) -> None:
        if news.stats is not None:
            self._stat_loggers[replica].record(news.stats, news.outputs)
        for output in news.outputs:
            entry = self._in_flight.get(output.request_id)
            if entry is None or entry.replica != replica:  # aborted meanwhile
                continue
            if output.prompt_logprobs is not None:
                if entry.prompt_logprobs_told:
                    output.prompt_logprobs = None
                entry.prompt_logprobs_told = True
            request = entry.request
            request.token_ids += output.new_token_ids
            request.num_cached_tokens = output.num_cached_tokens
            request.first_scheduled_time = output.first_scheduled_time
            request.num_preemptions = output.num_preemptions
            if output.finish_reason is not None:
                del self._in_flight[output.request_id]
                self.balancer.release(replica)
            self._news.append(output)

    def _go_on_without(self, replica: int, gone: Gone) -> None:
        """Move its requests, or give up if there is nowhere to move them."""
        self.balancer.remove(replica)
        if self._dead is not None:
            return
        if self._lock_step or not self.replicas.links:
            self.replicas.await_ends()
            together = "they share experts and cannot go on without each other: " if self._lock_step else ""
            ends = "; ".join(self.replicas.ends)
            self._dead = EngineDeadError(f"no replica is left: {together}{ends}. Make a new engine")
            return
        moving = [entry for entry in self._in_flight.values() if entry.replica == replica]
        logger.warning("%s; its %d unfinished requests go on elsewhere", gone.how, len(moving))
        for entry in moving:
            entry.replica = self._assign()
            entry.request.num_preemptions += entry.request.num_output_tokens > 0
            self._send(entry)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    # ---- everything else ------------------------------------------------------------------------

    def check_health(self) -> None:
        self._check_alive()

    def reset(self) -> None:
        self._in_flight.clear()
        self._news, self._failure = [], None
        self.balancer.clear()
        for link in self.replicas.links.values():
            link.send(Reset())
        # We may be here because of a Ctrl-C in the middle of anything, also of hearing that a replica is gone.
        self.replicas.recheck()
        for replica in self.balancer.loads.keys() - self.replicas.links.keys():
            self._go_on_without(replica, Gone(f"replica {replica} has ended"))

    def reset_prefix_cache(self) -> bool:
        """As for one core; False, too, while any request is unfinished."""
        return not self._in_flight and all(self._call("reset_prefix_cache"))

    def subscribe_kv_events(self, listener: KVListener) -> Callable[[], None]:
        raise ValueError(
            f"data_parallel_size={self.config.parallel.layout.data}: each replica has a cache of its own, and KV "
            f"events are those of one; subscribe to an engine with data_parallel_size=1"
        )

    def collective_rpc(
        self, method: str | Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> list[Any]:
        return [result for results in self._call("collective_rpc", method, args, kwargs) for result in results]

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every living replica's core; the results by replica. Raises what the first one raised."""
        self._check_alive()
        data = pack(args, method)
        self._num_calls += 1
        self._answers.clear()
        for link in self.replicas.links.values():
            link.send(Call(self._num_calls, method, data))
        while not self.replicas.links.keys() <= self._answers.keys():
            self._handle(*self.replicas.receive())  # however long it takes
        self._check_alive()
        answers = [(replica, answer.value) for replica, answer in sorted(self._answers.items())]
        for replica, value in answers:
            if isinstance(value, Failure):
                raise value.error(f"replica {replica}")
        return [value for _, value in answers]

    def shutdown(self) -> None:
        if self._dead is None:
            self._dead = EngineDeadError("the engine was shut down: make a new one")
        self._close()
