"""Several steps in flight: whatever meets whatever in the stages, every request's tokens are right.

The schedules of `test_schedules`, driven through a pipeline whose stages are real and whose results come late.
"""

from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course_lib import LLM, AsyncLLM, EngineArgs, LLMEngine, SamplingParams
from course_lib.config import EngineConfig
from course_lib.engine import core as engine_core
from course_lib.runner.model_runner import ModelRunner
from tests.engine.conftest import MAX_MODEL_LEN, save_tiny_llama
from tests.engine.fake_pipeline import FakePipeline
from tests.engine.test_schedules import Schedule, compare, crowded, run, schedules
from tests.oracle import Oracle

NUM_SCHEDULES = int(os.environ.get("COURSE_SCHEDULES", "15"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that there can be a stage in the middle."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("three-layers"), 1, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle(model_path: Path) -> Oracle:
    return Oracle(str(model_path), MAX_MODEL_LEN)


@pytest.fixture(autouse=True)
def invariants_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEBUG", "1")


def use_pipeline(patch: pytest.MonkeyPatch, depth: int, seed: int = 0) -> list[FakePipeline]:
    """Engines made from now on have fake pipelines with so many steps in flight, which are listed here."""
    made: list[FakePipeline] = []

    def make(config: EngineConfig) -> FakePipeline:
        made.append(FakePipeline(config, depth, seed))
        return made[-1]

    patch.setattr(engine_core, "make_executor", make)
    return made


def engine_args(path: Path, stages: int, **arguments: object) -> EngineArgs:
    return EngineArgs(
        model=str(path), skip_tokenizer_init=True, device="cpu", dtype="float32", disable_log_stats=True,
        pipeline_parallel_size=stages,
        **{"block_size": 4, "max_num_seqs": 8, "num_gpu_blocks_override": 64, **arguments},
    )  # fmt: skip


def tiny_engine(path: Path, stages: int = 1, **arguments: object) -> LLMEngine:
    return LLMEngine.from_engine_args(engine_args(path, stages, **arguments))


@settings(
    max_examples=NUM_SCHEDULES,
    deadline=None,
    derandomize="COURSE_SCHEDULES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(
    schedule=schedules(),
    # as many steps in flight as stages, which is what engines do; and one more
    shape=st.sampled_from([(2, 2), (3, 3), (2, 3)]),
    seed=st.integers(0, 1000),
)
def test_random_schedules_match_the_oracle(
    model_path: Path, oracle: Oracle, schedule: Schedule, shape: tuple[int, int], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_pipeline(patch, shape[1], seed)
        results, _ = run(model_path, schedule, pipeline_parallel_size=shape[0])
    compare(oracle, schedule, results)


def test_schedules_really_preempt_with_steps_in_flight(
    model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property above would be empty if only one step were ever in flight, or no cache ever filled."""
    schedule = crowded()
    made = use_pipeline(monkeypatch, depth=3)
    results, preemptions = run(model_path, schedule, pipeline_parallel_size=3)
    assert preemptions > 0 and made[0].most_in_flight == 3
    compare(oracle, schedule, results)


def shift(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return logits.roll(1 + len(output_ids))


def fail_at_third(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output_ids) == 2:
        raise ZeroDivisionError("mine")
    return logits


ASKED = {
    "greedy": SamplingParams(temperature=0, max_tokens=12),
    "three": SamplingParams(n=3, temperature=1.2, seed=10, max_tokens=8),
    "penalties": SamplingParams(temperature=0, max_tokens=10, repetition_penalty=1.4, frequency_penalty=0.3),
    "logprobs": SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=1),
    "processor": SamplingParams(temperature=0, max_tokens=7, logits_processors=[shift], ignore_eos=True),
    "broken": SamplingParams(temperature=0, max_tokens=7, logits_processors=[fail_at_third], ignore_eos=True),
    "least": SamplingParams(temperature=0, max_tokens=9, min_tokens=5),
    "last": SamplingParams(temperature=0, max_tokens=1),
}


def answers(engine: LLMEngine, asked: dict[str, SamplingParams] = ASKED) -> dict[str, list[tuple]]:
    """What each request ends with."""
    finished = {}
    for i, (name, params) in enumerate(asked.items()):
        engine.add_request(name, [5 + i + j % 7 for j in range(3 + 4 * i)], params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                likely = [round(v.logprob, 3) for row in (output.prompt_logprobs or [])[1:] for v in row.values()]
                finished[output.request_id] = [likely] + [
                    (one.token_ids, one.finish_reason, one.stop_reason, one.logprobs and len(one.logprobs))
                    for one in output.outputs
                ]
    return finished


@pytest.mark.parametrize("stages", [2, 3])
def test_whatever_is_asked_for_is_what_one_process_gives(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    expected = answers(tiny_engine(model_path))
    assert expected["broken"][1][1] == "abort" and "mine" in expected["broken"][1][2]
    made = use_pipeline(monkeypatch, depth=stages, seed=stages)
    engine = tiny_engine(model_path, stages)
    assert answers(engine) == expected
    assert made[0].most_in_flight == stages
    engine.step()  # lets the runners hear of the last endings
    assert all(not stage.runner.states and not stage.runner.batch.rows for stage in made[0].stages)


def test_aborted_in_flight(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever some requests are aborted, the others do not notice, and nothing stays in flight behind the last."""
    use_pipeline(monkeypatch, depth=2)
    engine = tiny_engine(model_path, 2)
    kept = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    alone = answers(engine, {"kept": kept})
    gone = SamplingParams(n=3, temperature=1.0, max_tokens=30, ignore_eos=True)
    for when in range(1, 8):
        engine.add_request("gone", [9, 8, 7], gone)
        engine.add_request("kept", [5, 6, 7], kept)
        outputs = [output for _ in range(when) for output in engine.step()]
        engine.abort_request("gone")
        while engine.has_unfinished_requests():
            outputs += engine.step()
        last = [one for one in outputs if one.request_id == "kept"][-1]
        assert last.outputs[0].token_ids == alone["kept"][1][0]
        assert not engine.core._in_flight
        pool = engine.core.scheduler.kv_cache.pool
        assert pool.num_free == pool.num_blocks
    engine.add_request("gone", [9, 8, 7], gone)
    engine.step()
    assert engine.core._in_flight
    engine.abort_request("gone")
    assert engine.core.has_work, "what is in flight must still be read"
    assert engine.step() == [] and not engine.core._in_flight


def test_coroutines_share_a_pipeline(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests join one after another, and one leaves: everybody gets what it would get alone."""
    prompts = [[5 + i, 6, 7] for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    alone = tiny_engine(model_path)
    expected = []
    for i, prompt in enumerate(prompts):
        alone.add_request(str(i), prompt, params)
        while alone.has_unfinished_requests():
            outputs = alone.step()
        expected.append(outputs[-1].outputs[0].token_ids)
    use_pipeline(monkeypatch, depth=2)

    async def ask(engine: AsyncLLM, i: int) -> list[int]:
        await asyncio.sleep(0.002 * i)
        async for output in engine.generate(prompts[i], params, str(i)):
            if i == 3 and len(output.outputs[0].token_ids) >= 4:
                break
        return output.outputs[0].token_ids

    async def all_of_them() -> list[list[int]]:
        engine = AsyncLLM.from_engine_args(engine_args(model_path, 2))
        found = await asyncio.gather(*(ask(engine, i) for i in range(len(prompts))))
        engine.shutdown()
        return found

    found = asyncio.run(all_of_them())
    assert found[3] == expected[3][: len(found[3])] and len(found[3]) >= 4
    assert found[:3] + found[4:] == expected[:3] + expected[4:]


def test_an_interrupted_step_leaves_a_usable_engine(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a result is waited for, with another step behind it."""
    use_pipeline(monkeypatch, depth=2)
    engine = tiny_engine(model_path, 2)
    expected = answers(engine)
    for when in range(1, 6):
        for i in range(4):
            engine.add_request(str(i), [5 + i, 6, 7, 8], SamplingParams(max_tokens=20, ignore_eos=True))
        for _ in range(when):
            engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(FakePipeline, "result", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        assert not engine.has_unfinished_requests() and not engine.core.has_work
        assert answers(engine) == expected


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_executor_ends_with_the_engine(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = use_pipeline(monkeypatch, depth=2)
    engine = tiny_engine(model_path, 2)
    engine.shutdown()
    engine.shutdown()
    forgotten = tiny_engine(model_path, 2)
    del forgotten
    gc.collect()
    with pytest.raises(ValueError, match="too few for one request of max_model_len=64 .* on each rank"):
        tiny_engine(model_path, 2, num_gpu_blocks_override=2, max_model_len=64)
    assert len(made) == 3 and not any(pipeline.stages for pipeline in made)


def test_stages_in_processes_answer_as_one_process_does(
    course_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The course model, greedy, float32, on two worker processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for the workers: this process has its threads already
    common: dict = {
        "model": str(course_model_path), "device": "cpu", "dtype": "float32", "max_model_len": 128,
        "num_gpu_blocks_override": 40, "max_num_batched_tokens": 128, "block_size": 8,
    }  # fmt: skip
    prompts = ["The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at"]
    params = SamplingParams(temperature=0, max_tokens=8)

    def texts(llm: LLM) -> list[str]:
        return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = texts(LLM(**common))
    llm = LLM(**common, pipeline_parallel_size=2)
    assert texts(llm) == expected
    assert llm.collective_rpc(count_layers) == [15, 15]
    llm.llm_engine.shutdown()


def count_layers(runner: ModelRunner) -> int:
    return len(runner.model.attention_layers())
