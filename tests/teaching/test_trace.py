"""What `record` writes down agrees with what the engine did, and leaves no trace in the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from course_lib import LLM, AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from course_lib.core.messages import SchedulerOutput
from course_lib.core.scheduler import Scheduler
from course_lib.runner.model_runner import ModelRunner
from course_lib.teaching.recording.trace import Trace, record

PROMPTS = {
    "a": [3, 4, 5, 6, 7, 8, 9, 10, 11], "b": [3, 4, 5, 6, 7, 8, 9, 20], "c": [30, 31, 32], "d": [40] * 14,
}  # fmt: skip


def args(path: Path) -> EngineArgs:
    """Few blocks of four slots: with several requests, some will be preempted."""
    return EngineArgs(
        model=str(path), skip_tokenizer_init=True, device="cpu", disable_log_stats=True, block_size=4,
        num_gpu_blocks_override=10, max_model_len=40, max_num_batched_tokens=12, max_num_seqs=4,
    )  # fmt: skip


@pytest.fixture
def engine(tiny_model_path: Path) -> LLMEngine:
    return LLMEngine.from_engine_args(args(tiny_model_path))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def run(engine: LLMEngine, prompts: dict[str, list[int]], params: SamplingParams) -> dict[str, list[int]]:
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params)
    tokens = {}
    while engine.has_unfinished_requests():
        tokens |= {out.request_id: list(out.outputs[0].token_ids) for out in engine.step()}
    return tokens


def test_every_step_is_consistent_and_nothing_is_changed_by_listening(
    engine: LLMEngine, tiny_model_path: Path
) -> None:
    with record(engine) as trace:
        tokens = run(engine, PROMPTS, greedy(12))
    assert tokens == run(LLMEngine.from_engine_args(args(tiny_model_path)), PROMPTS, greedy(12))

    assert (trace.block_size, trace.num_blocks, trace.token_budget, trace.max_num_seqs) == (4, 10, 12, 4)
    assert list(trace.requests) == list("abcd")
    sampled: dict[str, list[int]] = {name: [] for name in trace.requests}
    for index, step in enumerate(trace.steps):
        assert trace.step(index) is step and step.index == index
        assert sum(step.scheduled.values()) <= 12
        used = {block for table in step.block_tables.values() for block in table}
        assert len(used) + step.num_free == 10
        assert used.isdisjoint(step.cached_free) and len(step.cached_free) <= step.num_free
        assert step.block_tables.keys().isdisjoint(step.waiting) and {*step.preempted} <= {*step.waiting}
        assert step.scheduled.keys() <= step.block_tables.keys() == step.computed.keys()
        for name, table in step.block_tables.items():
            assert len(table) == -(-(step.computed[name] + step.scheduled.get(name, 0)) // 4)
        for name, new in step.sampled.items():
            sampled[name] += new
    assert sampled == tokens
    for before, after in pairwise(trace.steps):
        for name in before.scheduled.keys() & after.computed.keys() - {*after.preempted}:
            assert after.computed[name] == before.computed[name] + before.scheduled[name]
        assert after.start >= before.start + before.schedule_s + before.execute_s + before.update_s

    ends = [(name, reason) for step in trace.steps for name, reason in step.finished.items()]
    assert sorted(ends) == [(name, "length") for name in "abcd"]
    preemptions = [name for step in trace.steps for name in step.preempted]
    assert preemptions, "the cache was meant to be too small"
    for name, request in trace.requests.items():
        assert request.num_prompt_tokens == len(PROMPTS[name])
        assert request.num_preemptions == preemptions.count(name)
        assert request.arrival <= request.first_scheduled < request.first_token < request.finished
        assert 0 < request.ttft < request.total


def test_a_trace_survives_json(engine: LLMEngine) -> None:
    with record(engine) as trace:
        run(engine, PROMPTS, greedy(6))
    assert Trace.from_json(trace.to_json()) == trace
    for text in ("", "[]", "{}", '{"steps": [{}]}'):
        with pytest.raises(ValueError, match="not a trace"):
            Trace.from_json(text)


def test_steps_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no steps: generate something"):
        Trace(16, 8, 64, 4).step(0)


def test_shared_and_cached_blocks_are_seen(engine: LLMEngine) -> None:
    with record(engine) as trace:
        run(engine, {"a": PROMPTS["a"]}, greedy(2))
        run(engine, {"b": PROMPTS["b"], "c": PROMPTS["a"]}, greedy(2))
        run(engine, {"d": PROMPTS["d"]}, greedy(2))
    assert trace.requests["a"].num_cached_tokens == 0
    assert trace.requests["b"].num_cached_tokens == 4
    assert trace.requests["c"].num_cached_tokens == 8
    first = next(step for step in trace.steps if "c" in step.scheduled)
    assert first.computed["c"] == 8
    assert first.block_tables["b"][0] == first.block_tables["c"][0]
    assert trace.steps[0].cached_free == ()
    after = next(step for step in trace.steps if "d" in step.scheduled)
    assert {*after.cached_free} == {*first.block_tables["b"][:2], *first.block_tables["c"][:2]}


def test_siblings_and_ids_used_again_have_names_of_their_own(engine: LLMEngine) -> None:
    with record(engine) as trace:
        run(engine, {"x": [3, 4, 5]}, SamplingParams(n=2, seed=0, max_tokens=3, ignore_eos=True))
        run(engine, {"x": [3, 4, 5]}, greedy(3))
        run(engine, {"x": [3, 4, 5]}, greedy(3))
    assert list(trace.requests) == ["x/0", "x/1", "x", "x (2)"]
    assert [request.id for request in trace.requests.values()] == list(trace.requests)
    assert {name for step in trace.steps for name in step.scheduled} == {*trace.requests}


def test_aborts_are_told(engine: LLMEngine) -> None:
    with record(engine) as trace:
        engine.add_request("early", [3, 4], greedy(20))
        engine.abort_request("early")
        engine.add_request("late", [3, 4], greedy(20))
        engine.step()
        engine.step()
        engine.abort_request("late")
    assert [request.reason for request in trace.requests.values()] == ["abort", "abort"]
    assert trace.requests["early"].first_scheduled is None
    assert [step.finished for step in trace.steps] == [{}, {"late": "abort"}]


def test_requests_under_way_are_recorded_from_then_on(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPTS["a"], greedy(4))
    engine.step()
    with record(engine) as trace:
        engine.step()
    assert trace.steps[0].scheduled == {"a": 1} and trace.steps[0].computed == {"a": 9}
    assert trace.requests["a"].arrival == 0 and trace.requests["a"].finished is None
    while engine.has_unfinished_requests():
        engine.step()
    assert len(trace.steps) == 1 and trace.requests["a"].reason is None


class LaunchedStep:
    """A step that a CPU runner computes when it is asked for the result."""

    def __init__(self, runner: ModelRunner, plan: SchedulerOutput) -> None:
        self.result = lambda: runner.execute_model(plan)


def test_an_engine_that_runs_ahead_is_recorded_step_by_step(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(engine, PROMPTS, greedy(12))
    engine.reset_prefix_cache()
    monkeypatch.setattr(ModelRunner, "can_run_ahead", True)
    monkeypatch.setattr(ModelRunner, "launch", lambda runner, plan: LaunchedStep(runner, plan), raising=False)
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, greedy(12))
    tokens = {}
    while not engine.core._in_flight:  # until a step was launched ahead
        tokens |= {out.request_id: list(out.outputs[0].token_ids) for out in engine.step()}
    with record(engine) as trace:
        while engine.has_unfinished_requests():
            tokens |= {out.request_id: list(out.outputs[0].token_ids) for out in engine.step()}
            assert not engine.core._in_flight
    assert tokens == expected
    assert all(step.execute_s > 0 and step.sampled for step in trace.steps)
    assert engine.core.executor.can_run_ahead


def test_recording_goes_on_after_a_failed_step(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with record(engine) as trace:
        engine.add_request("lost", PROMPTS["a"], greedy(20))
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.core.executor.runner, "execute_model", None)
            with pytest.raises(TypeError):
                engine.step()
        assert trace.requests["lost"].reason == "dropped"
        run(engine, {"b": PROMPTS["b"]}, greedy(3))
    assert [step.scheduled for step in trace.steps] == [{"lost": 9}, {"b": 8}, {"b": 1}, {"b": 1}]
    assert [step.index for step in trace.steps] == [0, 1, 2, 3]
    assert trace.steps[0].finished == {"lost": "dropped"}
    assert trace.requests["b"].reason == "length"


def test_the_engine_is_as_it_was_afterwards(engine: LLMEngine) -> None:
    watched = (engine.core, engine.core.executor, engine.core.scheduler, engine.frontend)
    before = [{*vars(one)} for one in watched]
    engine.add_request("a", PROMPTS["a"], greedy(4))
    state = next(iter(engine.frontend.output_processor.states.values()))
    with pytest.raises(KeyError), record(engine):
        engine.step()
        assert "schedule" in vars(engine.core.scheduler) and "take" in vars(state)
        raise KeyError
    assert [{*vars(one)} for one in watched] == before and "take" not in vars(state)
    engine.core.reset()
    assert "schedule" not in vars(engine.core.scheduler)


def test_someone_elses_wrapper_is_called_and_put_back(engine: LLMEngine) -> None:
    calls = []
    original = engine.core.executor.execute_model
    engine.core.executor.execute_model = wrapper = lambda plan: calls.append(plan) or original(plan)
    with record(engine) as trace:
        run(engine, {"a": PROMPTS["a"]}, greedy(2))
    assert len(calls) == len(trace.steps) == 2
    assert engine.core.executor.execute_model is wrapper


def test_a_class_patched_during_the_recording_is_served(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = Scheduler.schedule
    with record(engine) as trace:
        monkeypatch.setattr(Scheduler, "schedule", lambda self: calls.append(1) or original(self))
        run(engine, {"a": PROMPTS["a"]}, greedy(3))
    assert len(calls) == len(trace.steps) == 3


def test_what_cannot_be_recorded_is_refused(engine: LLMEngine) -> None:
    with pytest.raises(TypeError, match="an LLM, LLMEngine or AsyncLLM, not str"), record("llm"):
        pass
    with record(engine):
        with pytest.raises(RuntimeError, match="already: use the trace of the outer"), record(engine):
            pass
    with record(engine) as trace:  # the refusal did not harm the outer recording, nor its end
        run(engine, {"a": PROMPTS["a"]}, greedy(1))
    assert len(trace.steps) == 1


def test_an_async_engine_is_recorded(tiny_model_path: Path) -> None:
    async def generate(engine: AsyncLLM, name: str, params: SamplingParams) -> None:
        async for _ in engine.generate(PROMPTS[name], params, name):
            if name == "d":
                return  # leaving early aborts the request

    async def main() -> Trace:
        engine = AsyncLLM.from_engine_args(args(tiny_model_path))
        try:
            with record(engine) as trace:
                params = {name: greedy(20 if name == "d" else 6) for name in PROMPTS}
                await asyncio.gather(*(generate(engine, name, params[name]) for name in PROMPTS))
        finally:
            engine.shutdown()
        return trace

    trace = asyncio.run(main())
    assert {name: trace.requests[name].reason for name in "abc"} == dict.fromkeys("abc", "length")
    assert sum(len(new) for step in trace.steps for name, new in step.sampled.items() if name in "abc") == 18
    assert all(trace.requests[name].ttft > 0 for name in PROMPTS)


@pytest.fixture(scope="module")
def llm(course_model_path: Path) -> Iterator[LLM]:
    yield LLM(str(course_model_path), device="cpu", max_model_len=128, num_gpu_blocks_override=16)


def test_text_takes_time_and_may_end_a_request(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, stop=["Paris"])
    with record(llm) as trace:
        outputs = llm.generate(["The capital of France is", "One, two, three,"], params, use_tqdm=False)
    assert outputs[0].outputs[0].stop_reason == "Paris"
    first, second = trace.requests.values()
    assert (first.reason, second.reason) == ("stop", "length")
    assert trace.steps[-1].finished == {second.id: "length"}
    assert {first.id: "stop"} in [step.finished for step in trace.steps]
    for request in (first, second):
        assert 0 < request.tokenize_s < request.first_scheduled - request.arrival
        assert 0 < request.detokenize_s < request.total
        assert request.first_token <= request.finished
