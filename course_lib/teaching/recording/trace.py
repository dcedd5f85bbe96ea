"""Records what one engine does, while a block of code runs.

The engine has no hook for this: methods of that one engine's objects are wrapped, and put back at the end.

Invariants: listening changes no result; after the block the engine's objects are as they were before; what is
patched into the engine's classes meanwhile is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from course_lib.teaching.recording.trace_data import RequestTrace, Step, Trace


@contextmanager
def step_by_step(core: Any) -> Iterator[None]:
    """Inside the block no step is launched before the tokens of the one before it are read, as on a GPU it may be:
    the tokens are the same, and every step is scheduled, run and read in that order."""
    runner = core.executor.runner
    before = vars(runner).get("can_run_ahead")  # of this one object: such a block may stand in another
    runner.can_run_ahead = False
    try:
        yield
    finally:
        if before is None:
            del runner.can_run_ahead
        else:
            runner.can_run_ahead = before


@contextmanager
def record(engine: Any) -> Iterator[Trace]:
    """Record what `engine` does inside the block.

        with record(llm) as trace:
            llm.generate(prompts, params)

    The trace grows while the block runs. Requests already under way are recorded from here on, as if they
    had arrived when the recording began.

    Args:
        engine: an `LLM`, `LLMEngine` or `AsyncLLM`.

    Raises:
        TypeError: `engine` is none of these.
        RuntimeError: it is being recorded already.
    """
    engine = getattr(engine, "llm_engine", engine)
    core = getattr(engine, "core", None) or getattr(engine, "_core", None)
    frontend = getattr(engine, "frontend", None) or getattr(engine, "_frontend", None)
    if core is None or frontend is None:
        raise TypeError(f"engine must be an LLM, LLMEngine or AsyncLLM, not {type(engine).__name__}")
    if hasattr(core, "recorder"):
        raise RuntimeError("engine is being recorded already: use the trace of the outer `with record(…)`")
    core.recorder = recorder = _Recorder(core, frontend)
    try:
        recorder.listen()
        yield recorder.trace
    finally:
        recorder.undo.close()
        del core.recorder


class _Recorder:
    """Wraps the methods of one engine's objects and writes what passes through them into a trace.

    Of an AsyncLLM the core's methods are called in the core's thread, the frontend's in the event loop; they
    write to different fields, except for a request's end, which both may tell.
    """

    def __init__(self, core: Any, frontend: Any) -> None:
        self.core, self.frontend = core, frontend
        self.trace = Trace(
            block_size=core.config.cache.block_size,
            num_blocks=core.num_blocks,
            token_budget=core.config.scheduler.max_num_batched_tokens,
            max_num_seqs=core.config.scheduler.max_num_seqs,
        )
        self.undo = ExitStack()
        self._zero = time.perf_counter()
        self._names: dict[str, str] = {}  # the core's id -> the name in the trace
        self._prepared: dict[str, tuple[float, float]] = {}  # the core's id -> arrival, tokenize_s
        self._open: Step | None = None  # scheduled, not yet run to its end

    def listen(self) -> None:
        """Start; `undo.close()` ends it."""
        self.undo.enter_context(step_by_step(self.core))
        for state in list(self.frontend.output_processor.states.values()):
            self._expect(state)
        self._wrap(self.frontend, "prepare", self._prepare)
        self._wrap(self.frontend, "register", self._register)
        self._wrap(self.core.executor, "execute_model", self._execute)
        self._wrap(self.core, "reset", self._reset)
        self._listen_to_scheduler()

    def _listen_to_scheduler(self) -> None:
        self._wrap(self.core.scheduler, "schedule", self._schedule)
        self._wrap(self.core.scheduler, "update_from_output", self._update)
        self._wrap(self.core.scheduler, "finish_requests", self._finish_requests)

    def _wrap(self, target: Any, name: str, around: Callable[..., Any]) -> None:
        """Let `around(original, *args)` stand in for a method of this one object."""
        own = vars(target).get(name)  # someone else's wrapper, to be called and put back

        def original(*args: Any, **kwargs: Any) -> Any:
            # Looked up at each call: the class may be given the learner's method while we listen.
            if own is not None:
                return own(*args, **kwargs)
            return getattr(type(target), name)(target, *args, **kwargs)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        def put_back() -> None:
            if vars(target).get(name) is not replacement:
                return  # wrapped again meanwhile, by someone who will not expect it gone
            if own is None:
                delattr(target, name)
            else:
                setattr(target, name, own)

        setattr(target, name, replacement)
        self.undo.callback(put_back)

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    # ---- the frontend: text ---------------------------------------------------------------------

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = self._now()
        prepared = original(*args, **kwargs)
        spent = self._now() - start
        for request in prepared.requests:
            self._prepared[request.request_id] = (start, spent)
        return prepared

    def _register(self, original: Callable[..., Any], prepared: Any) -> Any:
        requests = original(prepared)
        for request in requests:
            self._expect(self.frontend.output_processor.states[request.request_id])
        return requests

    def _expect(self, state: Any) -> None:
        """Name the request behind a `RequestState`, and listen to its tokens becoming text."""
        name = state.request_id if state.parent is None else f"{state.request_id}/{state.index}"
        request = self._add(state.core_id, name, len(state.prompt_token_ids))

        def take(original: Callable[..., Any], news: Any, now: float) -> Any:
            start = self._now()
            reason, stop_reason = original(news, now)
            end = self._now()
            request.detokenize_s += end - start
            if news.new_token_ids and request.first_token is None:
                request.first_token = end
            if reason is not None:
                request.finished, request.reason = end, reason
            return reason, stop_reason

        self._wrap(state, "take", take)

    def _add(self, core_id: str, name: str, num_prompt_tokens: int) -> RequestTrace:
        arrival, tokenize_s = self._prepared.pop(core_id, (0.0, 0.0))
        unique, count = name, 1
        while unique in self.trace.requests:  # callers may use an id again once its request has ended
            count += 1
            unique = f"{name} ({count})"
        self._names[core_id] = unique
        request = self.trace.requests[unique] = RequestTrace(unique, num_prompt_tokens, arrival, tokenize_s)
        return request

    # ---- the core: tokens and blocks ------------------------------------------------------------

    def _name(self, request: Any) -> str:
        if request.request_id not in self._names:  # aborted before we listened, but not yet in the core
            self._add(request.request_id, request.request_id, request.num_prompt_tokens)
        return self._names[request.request_id]

    def _schedule(self, original: Callable[..., Any]) -> Any:
        start = self._now()
        plan = original()
        spent = self._now() - start
        scheduler = self.core.scheduler
        names, pool = self._names, scheduler.kv_cache.pool
        waiting = tuple(self._name(request) for request in scheduler.waiting)
        running = {self._name(request): request for request in scheduler.running}
        scheduled = {names[core_id]: count for core_id, count in plan.num_scheduled_tokens.items()}
        lost = {names[core_id] for core_id in plan.preempted_request_ids}
        self._open = Step(
            index=len(self.trace.steps),
            start=start,
            schedule_s=spent,
            scheduled=scheduled,
            # the scheduler has counted this step's tokens as computed already
            computed={name: it.num_computed_tokens - scheduled.get(name, 0) for name, it in running.items()},
            block_tables={name: tuple(it.block_ids) for name, it in running.items()},
            waiting=waiting,
            preempted=tuple(name for name in waiting if name in lost),
            cached_free=tuple([block.block_id for block in pool.cached.values() if not block.ref_count]),
            num_free=pool.num_free,
        )
        for name in scheduled:
            request = self.trace.requests[name]
            if request.first_scheduled is None:
                request.first_scheduled = start
                request.num_cached_tokens = running[name].num_cached_tokens
        for name in lost:
            self.trace.requests[name].num_preemptions += 1
        return plan

    def _execute(self, original: Callable[..., Any], plan: Any) -> Any:
        start = self._now()
        output = original(plan)
        if self._open is not None:  # None: an AsyncLLM was in the middle of a step when we began
            self._open.execute_s = self._now() - start
        return output

    def _update(self, original: Callable[..., Any], output: Any) -> Any:
        start = self._now()
        news = original(output)
        step, self._open = self._open, None
        if step is not None:
            step.update_s = self._now() - start
            step.sampled = {self._names[item.request_id]: list(item.new_token_ids) for item in news}
            self.trace.steps.append(step)
            for item in news:
                if item.finish_reason is not None:
                    self._end(self._names[item.request_id], item.finish_reason)
        return news

    def _finish_requests(self, original: Callable[..., Any], request_ids: Any) -> Any:
        aborted = original(request_ids)
        for core_id in aborted:
            if core_id in self._names:
                # a stop string is an abort to the core; the frontend has told us the reason before
                self._end(self._names[core_id], self.trace.requests[self._names[core_id]].reason or "abort")
        return aborted

    def _reset(self, original: Callable[..., Any]) -> None:
        original()
        for name, request in self.trace.requests.items():
            if request.reason is None:
                self._end(name, "dropped")
        self._listen_to_scheduler()  # the engine has made itself a new one

    def _end(self, name: str, reason: str) -> None:
        request = self.trace.requests[name]
        if request.finished is None:
            request.finished, request.reason = self._now(), reason
        if self.trace.steps:  # who ends between two steps is told of by the first of them
            self.trace.steps[-1].finished[name] = reason
