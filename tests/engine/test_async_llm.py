"""The asynchronous engine: many coroutines, one core, nothing lost."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from course_lib import AsyncLLM, EngineArgs, LLMEngine, RequestOutputKind, SamplingParams
from course_lib.errors import EngineDeadError


def with_engine(path: Path, body: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run `body` with a fresh engine; afterwards its thread must be gone."""
    args = EngineArgs(model=str(path), skip_tokenizer_init=True, device="cpu", block_size=4,
                      num_gpu_blocks_override=64, max_num_seqs=8, disable_log_stats=True)  # fmt: skip

    async def main() -> None:
        engine = AsyncLLM.from_engine_args(args)
        try:
            await asyncio.wait_for(body(engine), timeout=60)
        finally:
            engine.shutdown()

    asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "engine-core"]


async def collect(engine: AsyncLLM, request_id: str, prompt: list[int], params: SamplingParams) -> list:
    return [output async for output in engine.generate(prompt, params, request_id)]


def test_concurrent_requests_get_what_they_would_get_alone(tiny_model_path: Path, tiny_engine: LLMEngine) -> None:
    prompts = [[3 + i, 4, 5 + i] for i in range(20)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    expected = []
    for i, prompt in enumerate(prompts):
        tokens: list[int] = []
        tiny_engine.add_request(str(i), prompt, params)
        while tiny_engine.has_unfinished_requests():
            tokens += [t for output in tiny_engine.step() for t in output.outputs[0].token_ids]
        expected.append(tokens)

    async def body(engine: AsyncLLM) -> None:
        results = await asyncio.gather(*(collect(engine, str(i), p, params) for i, p in enumerate(prompts)))
        for outputs, tokens in zip(results, expected, strict=True):
            assert [t for output in outputs for t in output.outputs[0].token_ids] == tokens
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]

    with_engine(tiny_model_path, body)


def test_a_slow_reader_gets_merged_deltas_and_loses_nothing(tiny_model_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def body(engine: AsyncLLM) -> None:
        fast = await collect(engine, "fast", [3, 4], params)
        slow, count = [], 0
        async for output in engine.generate([3, 4], params, "slow"):
            slow += output.outputs[0].token_ids
            count += 1
            await asyncio.sleep(0.1)
        assert slow == [t for output in fast for t in output.outputs[0].token_ids]
        assert count < 20

    with_engine(tiny_model_path, body)


def test_leaving_early_cancelling_and_aborting_free_everything(tiny_model_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

    async def body(engine: AsyncLLM) -> None:
        stream = engine.generate([3, 4], params, "left")
        await anext(stream)
        await stream.aclose()
        task = asyncio.create_task(collect(engine, "cancelled", [5, 6], params))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(collect(engine, "aborted", [7, 8], params))
        await asyncio.sleep(0.02)
        await engine.abort("aborted")
        outputs = await task
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        outputs = await collect(engine, "left", [3], SamplingParams(max_tokens=2))  # the id is free again
        assert outputs[-1].finished
        for _ in range(100):
            if await engine.reset_prefix_cache():  # only possible when no block is held
                return
            await asyncio.sleep(0.02)
        raise AssertionError("blocks are still held")

    with_engine(tiny_model_path, body)


def test_a_bad_request_raises_in_its_own_coroutine_only(tiny_model_path: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)

    async def body(engine: AsyncLLM) -> None:
        good = asyncio.create_task(collect(engine, "good", [3, 4], params))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="empty"):
            await collect(engine, "bad", [], params)
        with pytest.raises(ValueError, match="choose another"):
            await collect(engine, "good", [3], params)
        assert (await good)[-1].finished
        await engine.check_health()

    with_engine(tiny_model_path, body)


def test_a_failing_core_reaches_every_coroutine_and_no_new_request(tiny_model_path: Path) -> None:
    async def body(engine: AsyncLLM) -> None:
        def fail(*args: object) -> None:
            raise RuntimeError("the model broke")

        engine._core.executor.runner.model.forward = fail
        tasks = [asyncio.create_task(collect(engine, str(i), [3 + i], SamplingParams())) for i in range(3)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and "the model broke" in str(result)
        assert engine.errored and not engine.is_running
        with pytest.raises(EngineDeadError):
            await collect(engine, "later", [3], SamplingParams())

    with_engine(tiny_model_path, body)


def test_shutdown_wakes_everyone(tiny_model_path: Path) -> None:
    async def body(engine: AsyncLLM) -> None:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        task = asyncio.create_task(collect(engine, "a", [3, 4], params))
        await asyncio.sleep(0.01)
        engine.shutdown()
        engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await task

    with_engine(tiny_model_path, body)


def test_an_id_used_again_at_once_gets_nothing_of_the_old_request(tiny_model_path: Path) -> None:
    """The core may still be inside a step that computes the old request when the id is given to a new one."""
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, output_kind=RequestOutputKind.DELTA)

    async def body(engine: AsyncLLM) -> None:
        execute = engine._core.executor.execute_model

        def slowly(scheduled: object) -> object:
            time.sleep(0.02)  # so that the core is nearly always inside a step
            return execute(scheduled)

        engine._core.executor.execute_model = slowly
        expected = [t for o in await collect(engine, "ref", [9, 8], params) for t in o.outputs[0].token_ids]
        for _ in range(5):
            stream = engine.generate([3, 4], params, "a")
            await anext(stream)
            await anext(stream)
            await stream.aclose()
            got = [t for o in await collect(engine, "a", [9, 8], params) for t in o.outputs[0].token_ids]
            assert got == expected

    with_engine(tiny_model_path, body)


def test_a_failure_in_the_event_loop_or_a_death_while_waiting_wakes_everyone(tiny_model_path: Path) -> None:
    async def body(engine: AsyncLLM) -> None:
        def fail(news: object) -> None:
            time.sleep(0.05)
            raise RuntimeError("no text")

        engine._frontend.output_processor.process = fail
        waiting = asyncio.create_task(collect(engine, "a", [3], SamplingParams()))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match="no text"):
            await waiting
        assert engine.errored

    with_engine(tiny_model_path, body)


def test_a_forgotten_engine_is_freed(tiny_model_path: Path) -> None:
    args = EngineArgs(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", num_gpu_blocks_override=64)

    async def main() -> weakref.ref:
        engine = AsyncLLM.from_engine_args(args)
        await collect(engine, "a", [3], SamplingParams(max_tokens=2))
        return weakref.ref(engine)

    alive = asyncio.run(main())
    gc.collect()
    assert alive() is None
    for thread in threading.enumerate():
        if thread.name == "engine-core":
            thread.join(timeout=10)
            assert not thread.is_alive()
