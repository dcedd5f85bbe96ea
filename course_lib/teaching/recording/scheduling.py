"""One loaded engine, many schedules: other limits for as long as a block runs, with or without the model;
requests that arrive at a step of your choice; and batches that nobody may join or leave.

Owns what may be changed of an engine without loading another: its scheduler's limits, how many blocks of its
cache it uses, whether the model runs. Invariant: when the block is left, however it is left, the engine is
what it was before, and empty.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from course_lib.core.messages import ModelRunnerOutput
from course_lib.sampling_params import SamplingParams
from course_lib.teaching.recording.trace import record, step_by_step

if TYPE_CHECKING:
    from course_lib import LLM
    from course_lib.core.messages import SchedulerOutput
    from course_lib.engine.core import EngineCore
    from course_lib.teaching.recording.trace_data import Trace

FIRST_STAND_IN = 1000  # token ids of a run without the model: ordinary words in the usual vocabularies


@contextmanager
def limited(
    llm: LLM,
    *,
    num_blocks: int | None = None,
    enable_prefix_caching: bool | None = None,
    run_model: bool = True,
    check_invariants: bool = False,
    **limits: Any,
) -> Iterator[None]:
    """Inside the block, `llm` works within these limits.

        with limited(llm, max_num_seqs=8, num_blocks=40), record(llm) as trace:
            llm.generate(prompts, params)

    Args:
        num_blocks: blocks of the cache to use, at most what the engine has. If one request of `max_model_len`
            does not fit in them, `max_model_len` is lowered to what does.
        enable_prefix_caching: as of `LLM`.
        run_model: False: every token is a stand-in, at once. What the scheduler does is the same, unless
            requests end at a token rather than at a length.
        check_invariants: what COURSE_DEBUG=1 does: an AssertionError names the first invariant that breaks.
        limits: fields of `SchedulerConfig`, such as `max_num_batched_tokens`.

    Raises:
        TypeError: an unknown limit.
        ValueError: a limit that this engine was not built for.
        RuntimeError: the engine has unfinished requests.
    """
    core, frontend = llm.llm_engine.core, llm.llm_engine.frontend
    if llm.llm_engine.has_unfinished_requests():
        raise RuntimeError("the engine has unfinished requests: let them end, or abort them")
    before = core.config, core.num_blocks
    try:
        _set(core, frontend, *_changed(core, num_blocks, enable_prefix_caching, check_invariants, limits))
        if not run_model:
            core.executor.execute_model = lambda plan: _stand_in(core, plan)
        with step_by_step(core):
            yield
    finally:
        vars(core.executor).pop("execute_model", None)
        frontend.forget_all()
        _set(core, frontend, *before)


def serve(
    llm: LLM, jobs: Sequence[tuple[int, list[int], int]], **limits: Any
) -> tuple[list[list[int]], Trace]:
    """Serve requests that arrive while others are under way, greedily, without prefix caching by default.

    Args:
        jobs: for each request the step at which it arrives, from 0; its prompt's token ids; how many tokens
            to write.
        limits: as for `limited`.

    Returns:
        The answers' token ids, in the order of `jobs`, and the trace, which calls the requests "0", "1", …
    """
    engine = llm.llm_engine
    answers: dict[str, list[int]] = {}
    step = 0
    with limited(llm, **{"enable_prefix_caching": False, **limits}), record(llm) as trace:
        while len(answers) < len(jobs):
            for i, (arrival, prompt, length) in enumerate(jobs):
                if arrival == step:
                    params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                    engine.add_request(str(i), prompt, params)
            for output in engine.step():
                if output.finished:
                    answers[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
    return [answers[str(i)] for i in range(len(jobs))], trace


def static_batches(
    llm: LLM, prompts: Sequence[list[int]], *, seats: int, most: int
) -> tuple[list[list[int]], list[float], Trace]:
    """Greedy answers as a static batch gives them: groups of `seats` requests, in order, each group computed
    until its longest answer is complete, and handed over then. Prompts are not padded, which is kind to it.

    most: tokens of an answer, unless it ends by itself before.

    Returns:
        The answers' token ids, the seconds until each was handed over, and the trace.
    """
    engine, end = llm.llm_engine, llm.get_tokenizer().eos_token_id
    params = SamplingParams(
        temperature=0, max_tokens=most, ignore_eos=True
    )  # a row goes on when its answer has ended
    answers: list[list[int]] = []
    seconds: list[float] = []
    with limited(llm, max_num_seqs=seats, enable_prefix_caching=False), record(llm) as trace:
        start = time.perf_counter()
        for first in range(0, len(prompts), seats):
            group = {str(first + i): prompt for i, prompt in enumerate(prompts[first : first + seats])}
            for name, prompt in group.items():
                engine.add_request(name, prompt, params)
            complete: dict[str, list[int]] = {}
            while len(complete) < len(group):
                for output in engine.step():
                    token_ids = output.outputs[0].token_ids
                    if end in token_ids or len(token_ids) == most:
                        complete.setdefault(output.request_id, list(token_ids))
            engine.abort_request(group)
            answers += [complete[name] for name in group]
            seconds += [time.perf_counter() - start] * len(group)
    return answers, seconds, trace


def total_tokens(trace: Trace) -> int:
    """How many tokens all steps together computed."""
    return sum(sum(step.scheduled.values()) for step in trace.steps)


def step_ms(trace: Trace, num_tokens: int) -> float:
    """Milliseconds that the model took for the fastest step of `num_tokens` tokens; the first step is passed
    over, since it may pay for memory. Raises ValueError if there is no such step.
    """
    times = [step.execute_s for step in trace.steps[1:] if sum(step.scheduled.values()) == num_tokens]
    if not times:
        raise ValueError(f"num_tokens={num_tokens}: after its first, the trace has no step of so many tokens")
    return 1000 * min(times)


def _changed(
    core: EngineCore,
    num_blocks: int | None,
    enable_prefix_caching: bool | None,
    debug: bool,
    limits: dict[str, Any],
) -> tuple[Any, int]:
    """The engine's configuration and number of blocks, changed and checked."""
    own = core.config.scheduler
    blocks = core.num_blocks if num_blocks is None else num_blocks
    capacity = blocks * core.config.cache.block_size
    if not 1 <= blocks <= core.num_blocks:
        raise ValueError(
            f"num_blocks={num_blocks}: this engine's cache has {core.num_blocks}; use 1 to that many"
        )
    limits = {"max_model_len": min(own.max_model_len, capacity), **limits}
    scheduler = dataclasses.replace(own, **limits)
    for name, most in (
        ("max_num_seqs", own.max_num_seqs),
        ("max_model_len", min(own.max_model_len, capacity)),
    ):
        if not 1 <= getattr(scheduler, name) <= most:
            raise ValueError(f"{name}={getattr(scheduler, name)}: this engine has room for 1 to {most}")
    if scheduler.max_num_batched_tokens < 1:
        raise ValueError("max_num_batched_tokens must be at least 1")
    cache = core.config.cache
    if enable_prefix_caching is not None:
        cache = dataclasses.replace(cache, enable_prefix_caching=enable_prefix_caching)
    model = dataclasses.replace(core.config.model, max_model_len=scheduler.max_model_len)
    config = dataclasses.replace(core.config, scheduler=scheduler, cache=cache, model=model, debug=debug)
    return config, blocks


def _set(core: EngineCore, frontend: Any, config: Any, num_blocks: int) -> None:
    core.config = frontend.config = config
    frontend.input_processor.config = config.model
    core.num_blocks = num_blocks
    core.reset()  # a new scheduler, which reads both


def _stand_in(core: EngineCore, plan: SchedulerOutput) -> ModelRunnerOutput:
    """What a runner would answer: one token for everyone who is caught up."""
    requests = [core.scheduler.requests[request_id] for request_id in plan.num_scheduled_tokens]
    vocab = core.config.model.vocab_size
    tokens = [
        (
            [(FIRST_STAND_IN + one.num_output_tokens) % vocab]
            if one.num_computed_tokens == one.num_tokens
            else []
        )
        for one in requests
    ]
    return ModelRunnerOutput([one.request_id for one in requests], tokens)
