"""Decides, step by step, which requests compute how many tokens.

There is one rule. A request has `num_computed_tokens` and `num_tokens`; each step hands out new
tokens, within one budget, so that the first catches up with the second. A fresh prompt, a chunk of a
long one, the rest after a prefix hit, a single decode token, a preempted request starting over: all
are the same case.

A step serves running requests first, oldest first; when the cache is full, the least deserving
running request loses its blocks and waits. Then waiting requests are admitted, unless someone was
just preempted.

A pipeline of model stages has several steps in flight: planned, their tokens not known yet. A request
whose next token is in flight has nothing to compute (`num_computed_tokens == num_tokens`) and sits the
step out; a prompt's next chunk needs no token and goes on. Requests are dealt out evenly over the steps,
since a step that held all of them would leave every stage but one idle. Results are read in the order of
the plans. One that comes for a request preempted meanwhile still counts: its tokens stay right, only its
blocks are gone. One that comes for a request that has ended is dropped.

Blocks are taken back at once, though a step in flight may still write to them. That is safe because every
stage executes the steps in the order in which they were planned. Whoever is given the block is served by a
later step, so on each stage its writes come after the stale ones, and it reads nothing but what it wrote or
what the prefix cache promised. What the cache promises of a block is written by the step that the block was
registered for: that is executed in any case, whatever became of its request, and before all that could find it.

Invariants: the token budget and `max_num_seqs` are never exceeded; no request is both running and
waiting; every added request is finished exactly once; no slot is written twice in one step.

vLLM: `vllm/v1/core/sched/scheduler.py`. Iteration-level scheduling is Orca's (OSDI 2022), chunked
prefill Sarathi-Serve's (2403.02310).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol

from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import (
    CachedRequestData,
    EngineCoreOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from course_lib.core.request import Request, RequestStatus, check_stop
from course_lib.core.request_queue import FCFSQueue, PriorityQueue, priority_key


class SchedulerLimits(Protocol):
    """What the scheduler reads of `course_lib.config.SchedulerConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_chunked_prefill: bool
    long_prefill_token_threshold: int
    policy: str


class Scheduler:
    """Args:
    config: limits and policy.
    kv_cache: the cache to plan for; the scheduler is its only user.
    max_steps_in_flight: how many steps may be planned whose results are not known: as many as a pipeline has stages.
    tells_tokens: tell the runners what was sampled, of which those of a pipeline's stages but the last know nothing.
    """

    def __init__(
        self,
        config: SchedulerLimits,
        kv_cache: KVCacheManager,
        max_steps_in_flight: int = 1,
        *,
        tells_tokens: bool = False,
    ) -> None:
        self.config = config
        self.kv_cache = kv_cache
        self.max_steps_in_flight = max_steps_in_flight
        self.tells_tokens = tells_tokens
        self.requests: dict[str, Request] = {}  # every unfinished request
        self.waiting: FCFSQueue | PriorityQueue = (
            PriorityQueue() if config.policy == "priority" else FCFSQueue()
        )
        self.running: list[Request] = []  # in order of admission
        self._finished_ids: set[str] = set()  # to be told to the runner with the next step
        self._num_planned = self._num_read = 0  # steps with tokens; those in between are in flight
        self._ended_in_flight: dict[str, int] = {}  # id -> the last step planned before it was ended

    # ---- requests come and go -------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Queue `request`. Raises ValueError if its id belongs to a live request."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is already in use: choose another")
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def finish_requests(self, request_ids: Iterable[str]) -> list[str]:
        """Abort requests, whatever they are doing; unknown ids are passed over. Returns those ended."""
        aborted = []
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None:
                continue
            if request.status is RequestStatus.RUNNING:
                self.running.remove(request)
            else:
                self.waiting.remove(request)
            request.status = RequestStatus.FINISHED_ABORTED
            self._forget(request)
            aborted.append(request_id)
        return aborted

    def _forget(self, request: Request) -> None:
        self.kv_cache.free(request)
        del self.requests[request.request_id]
        self._finished_ids.add(request.request_id)
        if self._num_read < self._num_planned:
            self._ended_in_flight[request.request_id] = self._num_planned

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: requests to serve, or endings the runner must hear of."""
        return bool(self.requests or self._finished_ids)

    # ---- one step -------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan one step and count its tokens as computed."""
        budget = self.config.max_num_batched_tokens
        plan: dict[Request, tuple[int, list[int]]] = {}  # request -> (new tokens, new blocks)
        preempted: set[str] = set()

        budget = self._continue_running(budget, plan, preempted)
        admitted: list[Request] = []
        if not preempted:
            admitted = self._admit_waiting(budget, plan)

        output = self._make_output(plan, admitted, preempted)
        for request, (num_new, _) in plan.items():
            request.num_computed_tokens += num_new
        return output

    def schedule_ahead(self) -> SchedulerOutput | None:
        """Plan the step after the one in flight, whose tokens are not known yet; None if it needs them.

        It is planned when it can only be one more token for everybody: nobody is in the middle of a prompt, could
        be admitted or would have to be preempted. A request that the step in flight will end by its length is
        left out; one that it turns out to end by a stop token computes one token too many, which is dropped.
        """
        running, limits = self.running, self.config
        if self.waiting and len(running) < limits.max_num_seqs:
            return None
        if self.kv_cache.pool.num_free < len(running):  # each may need a block
            return None
        going_on = []
        for request in running:
            num_tokens = len(request.token_ids)
            if request.num_computed_tokens != num_tokens or not request.runs_ahead:
                return None
            num_tokens += 1  # the one in flight
            if num_tokens - request.num_prompt_tokens < request.max_tokens and num_tokens < limits.max_model_len:
                going_on.append(request)
        if not going_on:
            return None
        allocate, size = self.kv_cache.allocate_slots, self.kv_cache.block_size
        plan: dict[Request, tuple[int, list[int]]] = {}
        for request in going_on:
            computed = request.num_computed_tokens
            # In the middle of a block, with all full ones registered, there is nothing to allocate.
            idle = computed % size and (computed + 1) // size <= request.num_registered_blocks
            plan[request] = 1, [] if idle else allocate(request, 1)
        output = self._make_output(plan, [], set())
        for request in going_on:
            request.num_computed_tokens += 1
        return output

    def _continue_running(
        self, budget: int, plan: dict[Request, tuple[int, list[int]]], preempted: set[str]
    ) -> int:
        """Pass 1: give every running request its next tokens. Returns the budget left."""
        running = self.running
        allocate = self.kv_cache.allocate_slots
        turns = self._share
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            num_new = len(request.token_ids) - request.num_computed_tokens
            if num_new > 1:
                num_new = self._chunk(num_new, budget)
            elif num_new and turns:
                turns -= 1
            else:  # its token is in flight, or it is left to the next step of a pipeline
                index += 1
                continue
            new_blocks = allocate(request, num_new)
            while new_blocks is None:
                victim = self._choose_victim()
                if victim in plan:  # it was served earlier in this step (priority policy): take that back
                    budget += plan.pop(victim)[0]
                position = running.index(victim)
                self._preempt(victim)
                preempted.add(victim.request_id)
                if victim is request:
                    break
                if position < index:
                    index -= 1
                new_blocks = allocate(request, num_new)
            else:
                plan[request] = (num_new, new_blocks)
                budget -= num_new
                index += 1
        return budget

    def _admit_waiting(self, budget: int, plan: dict[Request, tuple[int, list[int]]]) -> list[Request]:
        """Pass 2: admit waiting requests in order until budget, seats or blocks run out."""
        admitted: list[Request] = []
        turns = self._share
        while self.waiting and budget > 0 and len(self.running) < self.config.max_num_seqs and len(admitted) < turns:
            request = self.waiting.peek()
            hit = self.kv_cache.get_computed_blocks(request)
            num_cached = len(hit) * self.kv_cache.block_size
            num_new = request.num_tokens - num_cached
            if self.config.enable_chunked_prefill:
                num_new = self._chunk(num_new, budget)
            elif num_new > budget:
                break
            new_blocks = self.kv_cache.allocate_slots(request, num_new, hit)
            if new_blocks is None:
                break
            self.waiting.pop()
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = num_cached
                if not request.needs_prompt_logprobs:  # those look nothing up
                    self.kv_cache.record_lookup(request.num_tokens, num_cached)
                request.first_scheduled_time = time.time()
            plan[request] = (num_new, new_blocks)
            budget -= num_new
            admitted.append(request)
        return admitted

    @property
    def _share(self) -> int:
        """How many requests a step gives one token at most, and how many it admits at most: an even part for each of
        the steps that may be in flight, which is everybody if that is only one."""
        num_requests = min(len(self.running) + len(self.waiting), self.config.max_num_seqs)
        return -(-num_requests // self.max_steps_in_flight)

    def _chunk(self, remaining: int, budget: int) -> int:
        """How many of the `remaining` tokens of one request are computed when `budget` tokens are left."""
        return min(remaining, self.config.long_prefill_token_threshold or remaining, budget)

    def _choose_victim(self) -> Request:
        if self.config.policy == "priority":
            return max(reversed(self.running), key=priority_key)  # of equals the youngest, as under FCFS
        return self.running[-1]

    def _preempt(self, request: Request) -> None:
        """Take all blocks of `request`; it will start over (or from what is still cached)."""
        self.running.remove(request)
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self.waiting.return_preempted(request)

    def _make_output(
        self,
        plan: dict[Request, tuple[int, list[int]]],
        admitted: list[Request],
        preempted: set[str],
    ) -> SchedulerOutput:
        """Turn the plan into messages; `num_computed_tokens` is still that before the step."""
        admitted_set = set(admitted)
        tells_tokens = self.tells_tokens
        cached = CachedRequestData()
        cached_ids, starts = cached.request_ids, cached.num_computed_tokens
        scheduled: dict[str, int] = {}
        total = 0
        for request, (num_new, new_blocks) in plan.items():
            scheduled[request.request_id] = num_new
            total += num_new
            if request not in admitted_set:
                start = request.num_computed_tokens
                cached_ids.append(request.request_id)
                cached.new_block_ids.append(new_blocks)
                starts.append(start)
                if tells_tokens:
                    sampled = request.token_ids[max(start, request.num_prompt_tokens) : start + num_new]
                    cached.new_token_ids.append(sampled)
        if plan:
            self._num_planned += 1
        new_requests = [
            NewRequestData(
                request_id=request.request_id,
                prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
                output_token_ids=request.output_token_ids,
                sampling_params=request.sampling_params,
                block_ids=list(request.block_ids),
                num_computed_tokens=request.num_computed_tokens,
            )
            for request in admitted
        ]
        finished, self._finished_ids = self._finished_ids, set()
        return SchedulerOutput(new_requests, cached, scheduled, total, preempted, finished)

    def update_from_output(self, output: ModelRunnerOutput) -> list[EngineCoreOutput]:
        """Append sampled tokens to their requests, end those that are done, report the news.

        Outputs are given in the order of the plans. One without requests, of a step that only told the runner
        something, may be left out.
        """
        if output.request_ids:
            self._num_read += 1
        this_step = self._num_read
        news: list[EngineCoreOutput] = []
        requests, ended = self.requests, self._ended_in_flight
        max_model_len = self.config.max_model_len
        logprobs = output.logprobs
        prompt_logprobs = output.prompt_logprobs
        any_finished = False
        for request_id, error in output.errors.items():
            request = requests.get(request_id)
            if request is not None and ended.get(request_id, 0) < this_step:
                request.status = RequestStatus.FINISHED_ABORTED
                request.stop_reason = error
        for row, request_id in enumerate(output.request_ids):
            request = requests.get(request_id)
            # Ended while the step was in flight; its id may already belong to a new request.
            if request is None or (ended and ended.get(request_id, 0) >= this_step):
                continue
            new_token_ids = output.sampled_token_ids[row]
            token_ids = request.token_ids
            finished = request.status is RequestStatus.FINISHED_ABORTED  # its own code failed
            if finished:
                any_finished, new_token_ids = True, []
            for count, token_id in enumerate(new_token_ids, 1):
                token_ids.append(token_id)
                if check_stop(request, max_model_len):
                    finished = any_finished = True
                    new_token_ids = new_token_ids[:count]
                    break
            row_prompt_logprobs = prompt_logprobs.get(request_id) if prompt_logprobs else None
            if not new_token_ids and row_prompt_logprobs is None and not finished:
                continue
            news.append(
                EngineCoreOutput(
                    request_id,
                    new_token_ids,
                    request.finish_reason if finished else None,
                    request.stop_reason,
                    logprobs[row] if logprobs is not None else None,
                    row_prompt_logprobs,
                    request.num_cached_tokens,
                    request.first_scheduled_time,
                    request.num_preemptions,
                )
            )
            if finished:
                if not request.block_ids:  # preempted while the step was in flight
                    self.waiting.remove(request)
                self._forget(request)
        if any_finished:
            self.running = [request for request in self.running if not request.is_finished]
        if ended:
            self._ended_in_flight = {i: last for i, last in self._ended_in_flight.items() if last > this_step}
        return news

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests hold blocks."""
        return self.kv_cache.reset_prefix_cache()

    # ---- executable invariants ------------------------------------------------------------------

    def check_invariants(self, output: SchedulerOutput | None = None) -> None:
        """Raise AssertionError naming the first broken invariant (of `output` too, if given)."""
        waiting = list(self.waiting)
        assert len(self.running) <= self.config.max_num_seqs, "more requests running than max_num_seqs"
        assert {*map(id, waiting), *map(id, self.running)} == {*map(id, self.requests.values())}, (
            "running and waiting together are not the unfinished requests"
        )
        assert len(waiting) + len(self.running) == len(self.requests), "a request is queued twice"
        for request in waiting:
            assert not request.block_ids, f"{request} waits but holds blocks"
        self.kv_cache.check_invariants(self.requests.values())
        if output is not None:
            self._check_output(output)

    def _check_output(self, output: SchedulerOutput) -> None:
        total = sum(output.num_scheduled_tokens.values())
        assert total == output.total_num_scheduled_tokens <= self.config.max_num_batched_tokens, (
            f"{total} tokens planned, budget {self.config.max_num_batched_tokens}"
        )
        size = self.kv_cache.block_size
        starts = dict(
            zip(output.cached_requests.request_ids, output.cached_requests.num_computed_tokens, strict=True)
        )
        starts |= {new.request_id: new.num_computed_tokens for new in output.new_requests}
        assert starts.keys() == output.num_scheduled_tokens.keys(), "planned requests and messages differ"
        written: dict[tuple[int, int], str] = {}
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            assert count > 0, f"{request} was planned with no token"
            for position in range(starts[request_id], starts[request_id] + count):
                slot = (request.block_ids[position // size], position % size)
                other = written.setdefault(slot, request_id)
                assert other == request_id, f"slot {slot} written by {other} and {request_id}"
