"""Random schedules against the oracle: whatever the scheduler does, every request's tokens are right.

Nearly every bug of a small engine is an interaction: a prefix hit inside a chunk, a preemption of a
request that was sharing blocks, an abort between two chunks. So arrivals, aborts, block sizes, budgets,
cache sizes, policies and shared prefixes are all drawn at random, invariants are checked after every
step, and each request's tokens are compared with those of `tests.oracle`.

`COURSE_SCHEDULES=2000 python3 -m course_lib test tests/engine/test_schedules.py` runs it long,
and `COURSE_TEST_DEVICE=cuda` runs it on the GPU's kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from course_lib.attention import torch_paged, torch_plan
from course_lib.core.request import Request
from course_lib.engine.core import EngineCore
from course_lib.engine_args import EngineArgs
from course_lib.layers import fused
from course_lib.sampling_params import SamplingParams
from tests.engine.conftest import MAX_MODEL_LEN, VOCAB
from tests.oracle import Oracle

NUM_SCHEDULES = int(os.environ.get("COURSE_SCHEDULES", "60"))
DEVICE = os.environ.get("COURSE_TEST_DEVICE", "cpu")
# On a CPU, decoding requests meet their common prefix together if that saves so many positions: far fewer than pay.
SHARED_FROM = 8
# Few distinct prefixes, so that requests really meet in the cache.
PREFIXES = [[3 + (7 * i + 11 * p) % (VOCAB - 3) for i in range(32)] for p in range(3)]


@dataclass
class Planned:
    """One request of a schedule."""

    arrival_step: int
    abort_step: int | None
    prompt: list[int]
    params: dict
    priority: int
    ignore_eos: bool


@dataclass
class Schedule:
    """A whole run: the engine's arguments and its requests."""

    engine: dict
    requests: list[Planned] = field(default_factory=list)
    plain_torch: bool = False  # on a CPU: do without the compiled kernels


@st.composite
def engines(draw: st.DrawFn) -> dict:
    block_size = draw(st.sampled_from([1, 2, 4, 8, 16]))
    smallest = -(-MAX_MODEL_LEN // block_size)
    max_num_seqs = draw(st.integers(1, 6))
    chunked = draw(st.booleans())
    budget = draw(st.integers(max_num_seqs, 40)) if chunked else draw(st.integers(MAX_MODEL_LEN, 100))
    return {
        "block_size": block_size,
        # From "one request fits and no more" to plenty: small caches force preemption.
        "num_gpu_blocks_override": draw(st.integers(smallest, 3 * smallest)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": budget,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": draw(st.booleans()),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 1, 5])) if chunked else 0,
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
    }


@st.composite
def planned_requests(draw: st.DrawFn) -> Planned:
    prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 32))]
    tail = draw(st.lists(st.integers(3, VOCAB - 1), min_size=0 if prefix else 1, max_size=6))
    max_tokens = draw(st.integers(1, 24))
    params: dict = {
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, min(3, max_tokens))),
        "stop_token_ids": draw(st.sampled_from([[], [5, 9, 17]])),
        "temperature": 0.0,
    }
    if DEVICE == "cpu" and draw(st.booleans()):  # a GPU's generators give other random numbers than the oracle's
        params |= {"temperature": 1.3, "seed": draw(st.integers(0, 3))}
    if draw(st.integers(0, 4)) == 0:
        params["prompt_logprobs"] = 1
    return Planned(
        arrival_step=draw(st.integers(0, 12)),
        abort_step=draw(st.none() | st.integers(0, 25)),
        prompt=[*prefix, *tail],
        params=params,
        priority=draw(st.integers(0, 2)),
        ignore_eos=draw(st.booleans()),
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    requests = draw(st.lists(planned_requests(), min_size=1, max_size=9))
    return Schedule(draw(engines()), requests, plain_torch=draw(st.booleans()))


@dataclass
class Result:
    """What the engine said of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[float] | None = None


def run(path: Path, schedule: Schedule, **extra: object) -> tuple[dict[str, Result], int]:
    """Drive an engine core through the schedule; returns results and how many preemptions there were."""
    args = EngineArgs(model=str(path), skip_tokenizer_init=True, device=DEVICE, dtype="float32", **schedule.engine, **extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_plan, "_WORTH_SHARING", SHARED_FROM)
        if schedule.plain_torch:
            for module in (torch_paged, fused):
                patch.setattr(module, "compiled_kernels", lambda: None)
        return drive(EngineCore(args.create_engine_config()), schedule)


def drive(core: EngineCore, schedule: Schedule) -> tuple[dict[str, Result], int]:
    """See `run`."""
    results = {str(i): Result() for i in range(len(schedule.requests))}
    preemptions = 0
    step = 0
    while step <= 26 or core.has_work:
        for i, planned in enumerate(schedule.requests):
            if planned.arrival_step == step:
                params = SamplingParams(ignore_eos=planned.ignore_eos, **planned.params)
                params.resolve(VOCAB, () if planned.ignore_eos else (2,))
                core.add_request(
                    Request(
                        str(i), planned.prompt, params, 2, arrival_time=i + 100.0 * step,
                        priority=planned.priority if schedule.engine["scheduling_policy"] == "priority" else 0,
                    )  # fmt: skip
                )
            if planned.abort_step == step and planned.arrival_step <= step:
                if core.scheduler.finish_requests([str(i)]):
                    results[str(i)].finish_reason = "abort"
        news = core.step()
        if core.last_scheduled is not None:
            preemptions += len(core.last_scheduled.preempted_request_ids)
        core.scheduler.check_invariants()
        for item in news:
            result = results[item.request_id]
            assert result.finish_reason is None, f"request {item.request_id}: news after its end"
            result.token_ids += item.new_token_ids
            result.finish_reason = item.finish_reason
            if item.prompt_logprobs is not None:
                assert result.prompt_logprobs is None, "prompt log-probabilities came twice"
                result.prompt_logprobs = [row[0] for row in item.prompt_logprobs.logprobs]
        step += 1
        assert step < 3000, "the engine makes no progress"
    pool = core.scheduler.kv_cache.pool
    assert pool.num_free == pool.num_blocks, "blocks were not returned"
    return results, preemptions


def compare(oracle: Oracle, schedule: Schedule, results: dict[str, Result]) -> None:
    """Every request against the oracle."""
    for i, planned in enumerate(schedule.requests):
        result, params = results[str(i)], planned.params
        assert result.finish_reason is not None, f"request {i} never finished"
        expected = oracle.generate(
            planned.prompt,
            params["max_tokens"],
            stop_token_ids=tuple(params["stop_token_ids"]),
            eos_token_id=None if planned.ignore_eos else 2,
            min_tokens=params["min_tokens"],
            temperature=params["temperature"],
            seed=params.get("seed"),
        )
        if result.finish_reason == "abort":
            got = result.token_ids[: expected.certain]
            assert got == expected.token_ids[: len(got)], f"request {i} (aborted): {result} != {expected}"
        else:
            assert expected.agrees(result.token_ids, result.finish_reason), f"request {i}: {result} != {expected}"
        if "prompt_logprobs" in params and result.finish_reason != "abort":
            want = oracle.prompt_logprobs(planned.prompt).tolist() if len(planned.prompt) > 1 else []
            assert len(result.prompt_logprobs) == len(want)
            assert all(abs(a - b) < 1e-3 for a, b in zip(result.prompt_logprobs, want, strict=True))


@settings(
    max_examples=NUM_SCHEDULES,
    deadline=None,
    derandomize="COURSE_SCHEDULES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(schedule=schedules())
def test_random_schedules_match_the_oracle(tiny_model_path: Path, oracle: Oracle, schedule: Schedule) -> None:
    results, _ = run(tiny_model_path, schedule)
    compare(oracle, schedule, results)


def crowded(*, plain_torch: bool = False, **params: object) -> Schedule:
    """Five requests that share a prefix and outgrow the cache together."""
    params = {"max_tokens": 24, "min_tokens": 0, "stop_token_ids": [], "temperature": 0.0, **params}
    requests = [Planned(0, None, PREFIXES[0][:20] + [i], params, 0, ignore_eos=True) for i in range(3, 8)]
    engine = {
        "block_size": 4, "num_gpu_blocks_override": 18, "max_num_seqs": 5, "max_num_batched_tokens": 30,
        "enable_chunked_prefill": True, "enable_prefix_caching": True, "scheduling_policy": "fcfs",
    }  # fmt: skip
    return Schedule(engine, requests, plain_torch)


def test_schedules_really_preempt_and_really_share(
    tiny_model_path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property above would be empty if small caches never filled, or no prefix was ever shared: here they must."""
    behind_prefix = Mock(wraps=torch_paged.TorchPagedBackend._attend_behind_prefix)
    monkeypatch.setattr(
        torch_paged.TorchPagedBackend, "_attend_behind_prefix", lambda *arguments: behind_prefix(*arguments)
    )
    schedule = crowded(plain_torch=True)
    results, preemptions = run(tiny_model_path, schedule)
    assert preemptions > 0 and (behind_prefix.called or DEVICE != "cpu")
    compare(oracle, schedule, results)
