"""KV events, statistics and extra keys through a whole engine: a mirror fed by events knows what is cached."""

from __future__ import annotations

import asyncio
import logging
import random
from pathlib import Path

import msgpack
import pytest
import zmq

from course_lib import EngineArgs, LLMEngine
from course_lib.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from course_lib.core.prefix_hash import CacheKeys
from course_lib.engine.async_llm import AsyncLLM
from course_lib.engine.kv_event_publisher import ZmqEventPublisher
from course_lib.engine.stat_logger import StatLogger, StepStats
from course_lib.sampling_params import SamplingParams
from tests.engine.conftest import VOCAB
from tests.kv_mirror import KVMirror

WAIT_MS = 5000


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def finish(engine: LLMEngine) -> dict[str, int]:
    """Step until all are done. Returns how many prompt tokens each found."""
    cached = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            cached[output.request_id] = output.num_cached_tokens
    return cached


def pool_of(engine: LLMEngine):
    return engine.core.scheduler.kv_cache.pool


def test_a_mirror_equals_the_cache_after_every_step(tiny_model_path: Path) -> None:
    """Shared prefixes, a cache so small that blocks are evicted and requests preempted, aborts, a failing step."""
    rng = random.Random(1)
    engine = LLMEngine.from_engine_args(
        EngineArgs(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, max_num_seqs=4,
                   num_gpu_blocks_override=18, max_num_batched_tokens=24, disable_log_stats=True)  # fmt: skip
    )
    mirror = KVMirror()
    engine.subscribe_kv_events(mirror)
    stems = [[rng.randrange(3, VOCAB) for _ in range(30)] for _ in range(2)]
    preempted = 0
    for number in range(30):
        prompt = stems[number % 2][: rng.randint(1, 30)] + [rng.randrange(3, VOCAB)]
        engine.add_request(str(number), prompt, greedy(rng.randint(1, 20)))
        for _ in range(rng.randint(0, 6)):
            engine.step()
            preempted += len(engine.core.last_scheduled.preempted_request_ids)
            assert mirror.blocks.keys() == pool_of(engine).cached.keys()
        if number % 7 == 6:
            engine.abort_request(str(number))
    while engine.has_unfinished_requests():
        engine.step()
        assert mirror.blocks.keys() == pool_of(engine).cached.keys()
    assert preempted and pool_of(engine).num_evictions
    assert min(mirror.kinds[BlockStored], mirror.kinds[BlockRemoved]) > 9
    assert mirror.blocks and engine.reset_prefix_cache() and not mirror.blocks


def test_an_interrupted_step_clears_the_mirror(tiny_engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = KVMirror()
    tiny_engine.subscribe_kv_events(mirror)
    tiny_engine.add_request("a", list(range(3, 20)), greedy(9))
    tiny_engine.step()
    assert len(mirror.blocks) == 4
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(tiny_engine.core.executor, "execute_model", _interrupt)
        tiny_engine.step()
    assert not mirror.blocks and mirror.kinds[AllBlocksCleared]
    tiny_engine.add_request("a", list(range(3, 20)), greedy(1))
    finish(tiny_engine)
    assert mirror.blocks.keys() == pool_of(tiny_engine).cached.keys() and len(mirror.blocks) == 4


def _interrupt(scheduled: object) -> None:
    raise KeyboardInterrupt


def test_subscriptions_begin_empty_and_end(tiny_engine: LLMEngine, caplog: pytest.LogCaptureFixture) -> None:
    prompt = list(range(3, 20))
    tiny_engine.add_request("a", prompt, greedy(1))
    with pytest.raises(RuntimeError, match="before the first request"):
        tiny_engine.step()
        tiny_engine.add_request("b", prompt, greedy(1))
        tiny_engine.add_request("c", prompt, greedy(2))
        tiny_engine.step()
        tiny_engine.subscribe_kv_events(print)
    finish(tiny_engine)
    assert pool_of(tiny_engine).cached and pool_of(tiny_engine).events is None

    def broken(events: list) -> None:
        raise ZeroDivisionError("in the listener")

    mirror = KVMirror()
    ends = [tiny_engine.subscribe_kv_events(listener) for listener in (broken, mirror)]
    assert not pool_of(tiny_engine).cached, "what was cached before cannot be told: it is forgotten"
    tiny_engine.add_request("d", prompt, greedy(1))
    finish(tiny_engine)
    assert len(mirror.blocks) == 4 and "listener to KV events failed" in caplog.text
    for end in ends:
        end()
    tiny_engine.add_request("e", prompt[::-1], greedy(1))
    finish(tiny_engine)
    assert len(mirror.blocks) == 4 and pool_of(tiny_engine).events is None


def test_an_engine_without_a_cache_has_no_events(tiny_model_path: Path) -> None:
    args = EngineArgs(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", enable_prefix_caching=False,
        num_gpu_blocks_override=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="enable_prefix_caching=False"):
        LLMEngine.from_engine_args(args).subscribe_kv_events(print)


# ---- over ZeroMQ -----------------------------------------------------------------------------------


def from_wire(payload: bytes) -> list:
    """A message's events, as `core.kv_events` has them (the kinds of extra keys are not sent)."""
    when, events, rank = msgpack.unpackb(payload)
    assert when > 1e9 and rank == 0
    made = []
    for event in events:
        kind = event.pop("type")
        if kind == "BlockStored":
            assert event.pop("lora_id") is None and event.pop("medium") == "GPU"
            made.append(BlockStored(**event))
        elif kind == "BlockRemoved":
            assert event.pop("medium") == "GPU"
            made.append(BlockRemoved(**event))
        else:
            assert kind == "AllBlocksCleared" and not event
            made.append(AllBlocksCleared())
    return made


def test_another_process_could_follow_over_zeromq(tiny_engine: LLMEngine) -> None:
    """Live messages and a replay of the same: both build the mirror of what is cached."""
    live, replayed = KVMirror(), KVMirror()
    with zmq.Context() as context, ZmqEventPublisher() as publisher, ZmqEventPublisher() as another:
        assert publisher.endpoint != another.endpoint, "two engines' publishers live side by side"
        reader, asker = context.socket(zmq.SUB), context.socket(zmq.DEALER)
        reader.connect(publisher.endpoint)
        asker.connect(publisher.replay_endpoint)
        reader.subscribe(b"kv-events")
        while not reader.poll(20):  # until the subscription has arrived
            publisher([])
        tiny_engine.subscribe_kv_events(publisher)
        for number in range(4):
            tiny_engine.add_request(str(number), [*range(3, 15), 20 + number, 4], greedy(6))
        finish(tiny_engine)
        assert tiny_engine.reset_prefix_cache()
        tiny_engine.add_request("last", list(range(30, 41)), greedy(1))
        finish(tiny_engine)
        publisher([])
        last = publisher._sequence - 1
        numbers = []
        while not numbers or numbers[-1] < last:
            assert reader.poll(WAIT_MS)
            topic, number, payload = reader.recv_multipart()
            assert topic == b"kv-events"
            numbers.append(int.from_bytes(number, "big"))
            live(from_wire(payload))
        assert numbers == list(range(numbers[0], last + 1))
        asker.send_multipart([b"", (0).to_bytes(8, "big")])
        for number in range(last + 1):
            assert asker.poll(WAIT_MS)
            empty, topic, at, payload = asker.recv_multipart()
            assert (empty, topic, int.from_bytes(at, "big")) == (b"", b"kv-events", number)
            replayed(from_wire(payload))
        assert asker.poll(WAIT_MS) and asker.recv_multipart()[1:] == [b"", b"\xff" * 8, b""]
        context.destroy(linger=0)
    assert live.blocks == replayed.blocks and len(live.blocks) == 2
    assert live.blocks.keys() == pool_of(tiny_engine).cached.keys()
    assert live.kinds[BlockStored] > 4 and live.kinds[AllBlocksCleared] == 1
    with pytest.raises(RuntimeError, match="closed"):
        publisher([])


def test_extra_keys_are_sent_as_vllm_sends_them() -> None:
    from course_lib.engine.kv_event_publisher import _to_wire

    keys = (("lora", "sql", "/sql"), ("mm", "cat", -2), ("cache_salt", "tenant"))
    sent = _to_wire(BlockStored([b"h"], None, [1], 1, "sql", [keys, ()]))
    assert sent["extra_keys"] == [["sql", ("cat", -2), "tenant"], None] and sent["lora_name"] == "sql"


def test_an_async_engine_reports_too(tiny_model_path: Path) -> None:
    args = EngineArgs(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, num_gpu_blocks_override=32
    )
    engine = AsyncLLM.from_engine_args(args)
    mirror = KVMirror()
    engine.subscribe_kv_events(mirror)

    async def use() -> None:
        async for _ in engine.generate({"prompt_token_ids": list(range(3, 20))}, greedy(3), "a"):
            pass
        assert len(mirror.blocks) == 4
        with pytest.raises(RuntimeError, match="before the first request"):
            engine.subscribe_kv_events(print)
        assert await engine.reset_prefix_cache() and not mirror.blocks

    try:
        asyncio.run(use())
    finally:
        engine.shutdown()


# ---- statistics and extra keys ---------------------------------------------------------------------


def test_n_outputs_share_their_prompt_under_the_salt_of_their_request(tiny_engine: LLMEngine) -> None:
    prompt = list(range(3, 20))
    seen = []
    for name, salt in (("a", None), ("b", "tenant"), ("c", "tenant"), ("d", "other")):
        given = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        tiny_engine.add_request(name, given, SamplingParams(temperature=1.0, n=3, max_tokens=2, ignore_eos=True))
        assert {request.cache_keys for request in tiny_engine.core.scheduler.requests.values()} == {
            CacheKeys(salt=salt) if salt else None
        }
        before = pool_of(tiny_engine).num_free
        tiny_engine.step()
        seen.append(before - pool_of(tiny_engine).num_free)
        finish(tiny_engine)
    # 4 full blocks once, 3 private ones; the second request of the tenant finds the 4 blocks among the free ones
    assert seen == [7, 7, 7, 7]
    stats = tiny_engine.core.scheduler.kv_cache.stats
    assert (stats.requests, stats.hit_requests) == (12, 9) and stats.hit_tokens == 9 * 16
    assert stats.hit_rate == stats.recent_hit_rate == 9 * 16 / (12 * 17)


def test_requests_that_look_nothing_up_are_not_counted(tiny_engine: LLMEngine) -> None:
    for name, more in (("a", {}), ("b", {"prompt_logprobs": 1}), ("c", {})):
        tiny_engine.add_request(name, {"prompt_token_ids": list(range(3, 20))}, greedy(1, **more))
        finish(tiny_engine)
    stats = tiny_engine.core.scheduler.kv_cache.stats
    assert (stats.requests, stats.hit_requests, stats.hit_rate) == (2, 1, 16 / 34)


def test_the_line_of_statistics_tells_of_the_cache(tiny_engine: LLMEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for number in range(20):  # 5 blocks and more each, of which 4 are shared with one other: 64 blocks are too few
        tiny_engine.add_request(str(number), [3 + number // 2] * 17 + [3] * number, greedy(1))
        finish(tiny_engine)
    stats, pool = tiny_engine.core.scheduler.kv_cache.stats, pool_of(tiny_engine)
    assert stats.hit_requests == 10 and pool.num_evictions > 0
    StatLogger(interval=0).record(StepStats.of(tiny_engine.core), [])
    line = caplog.messages[-1]
    assert f"prefix cache hit rate {100 * stats.recent_hit_rate:.1f}%, blocks evicted {pool.num_evictions}" in line
