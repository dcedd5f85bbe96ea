"""The scheduler alone: no model, no tensor, every schedule in microseconds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from course_lib.bench.steps import measure_steps
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.core.prefix_hash import CacheKeys
from course_lib.core.request import Request, RequestStatus
from course_lib.core.scheduler import Scheduler
from course_lib.sampling_params import SamplingParams


@dataclass
class Limits:
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    max_model_len: int = 1024
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    policy: str = "fcfs"


def make_scheduler(num_blocks: int = 64, block_size: int = 4, caching: bool = True, **limits) -> Scheduler:
    return Scheduler(Limits(**limits), KVCacheManager(num_blocks, block_size, caching))


def make_request(name: str, prompt: int | list[int], max_tokens: int = 8, priority: int = 0, arrival: float = 0.0,
                 **params) -> Request:  # fmt: skip
    if isinstance(prompt, int):
        prompt = [hash((name, i)) % 1000 for i in range(prompt)]
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return Request(name, prompt, sampling, None, arrival, priority)


def sample(scheduler: Scheduler, scheduled: SchedulerOutput, token: int = 7) -> ModelRunnerOutput:
    """What a runner would answer: one token for everyone who is caught up."""
    ids = list(scheduled.num_scheduled_tokens)
    requests = [scheduler.requests[i] for i in ids]
    return ModelRunnerOutput(ids, [[token] if r.num_computed_tokens == r.num_tokens else [] for r in requests])


def step(scheduler: Scheduler) -> SchedulerOutput:
    scheduled = scheduler.schedule()
    scheduler.check_invariants(scheduled)
    scheduler.update_from_output(sample(scheduler, scheduled))
    scheduler.check_invariants()
    return scheduled


def test_one_budget_for_all_chunks() -> None:
    """Prompts of 100, 30 and 10 tokens under a budget of 64."""
    scheduler = make_scheduler()
    for name, length in (("a", 100), ("b", 30), ("c", 10)):
        scheduler.add_request(make_request(name, length))
    assert step(scheduler).num_scheduled_tokens == {"a": 64}
    assert step(scheduler).num_scheduled_tokens == {"a": 36, "b": 28}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 2, "c": 10}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}


def test_a_long_prompt_is_capped_per_step() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=10)
    scheduler.add_request(make_request("long", 25))
    scheduler.add_request(make_request("short", 5))
    assert step(scheduler).num_scheduled_tokens == {"long": 10, "short": 5}
    assert step(scheduler).num_scheduled_tokens == {"long": 10, "short": 1}


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False)
    scheduler.add_request(make_request("a", 40))
    scheduler.add_request(make_request("b", 30))
    assert step(scheduler).num_scheduled_tokens == {"a": 40}
    assert step(scheduler).num_scheduled_tokens == {"a": 1, "b": 30}


def test_the_youngest_is_preempted_and_returns_first() -> None:
    scheduler = make_scheduler(num_blocks=4, caching=False)
    for name in "abc":
        scheduler.add_request(make_request(name, 4 if name != "c" else 8))
    assert step(scheduler).num_scheduled_tokens == {"a": 4, "b": 4, "c": 8}
    second = step(scheduler)  # a and b need a second block each: c gives up its two
    assert second.num_scheduled_tokens == {"a": 1, "b": 1}
    assert second.preempted_request_ids == {"c"}
    assert [r.request_id for r in scheduler.waiting] == ["c"]
    assert scheduler.requests["c"].status is RequestStatus.PREEMPTED
    while "a" in scheduler.requests:
        step(scheduler)
    assert scheduler.requests["c"].num_preemptions >= 1


def test_a_full_prefix_hit_leaves_one_token_to_compute() -> None:
    scheduler = make_scheduler()
    prompt = list(range(8))  # exactly two blocks
    scheduler.add_request(make_request("first", prompt, max_tokens=1))
    step(scheduler)
    scheduler.add_request(make_request("second", prompt, max_tokens=1))
    assert step(scheduler).num_scheduled_tokens == {"second": 4}  # one block reused, not both
    stats = scheduler.kv_cache.stats
    assert (stats.queried_tokens, stats.hit_tokens) == (16, 4)


def test_requests_of_one_step_share_their_prompt() -> None:
    scheduler = make_scheduler()
    for name in "abc":
        scheduler.add_request(make_request(name, list(range(10))))
    assert step(scheduler).num_scheduled_tokens == {"a": 10, "b": 2, "c": 2}
    tables = [scheduler.requests[name].block_ids for name in "abc"]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]


def test_salts_keep_caches_apart() -> None:
    scheduler = make_scheduler()
    for name, salt in (("a", None), ("b", "x"), ("c", "x")):
        request = make_request(name, list(range(10)))
        request.cache_keys = salt and CacheKeys(salt=salt)
        scheduler.add_request(request)
    assert step(scheduler).num_scheduled_tokens == {"a": 10, "b": 10, "c": 2}


def test_blocks_of_a_step_that_was_taken_back_are_not_offered() -> None:
    """Priority policy: "low" is served first in the step, registers a full block, and is then preempted
    by "high" later in the same step. That block was never computed: nobody may hit it."""
    scheduler = make_scheduler(num_blocks=5, policy="priority", long_prefill_token_threshold=4)
    low = make_request("low", list(range(100, 116)), priority=5, arrival=0)
    scheduler.add_request(low)
    assert step(scheduler).num_scheduled_tokens == {"low": 4}
    scheduler.add_request(make_request("high", list(range(4)), priority=0, arrival=1))
    assert step(scheduler).num_scheduled_tokens == {"low": 4, "high": 4}
    scheduler.config.long_prefill_token_threshold = 8
    third = step(scheduler)  # low takes the last two blocks, high then needs one
    assert third.preempted_request_ids == {"low"} and third.num_scheduled_tokens == {"high": 1}
    found = [scheduler.kv_cache.pool.find(content_hash) is not None for content_hash in low.block_hashes]
    assert found == [True, True, False, False]


def test_priority_goes_first_and_low_priority_is_preempted() -> None:
    scheduler = make_scheduler(policy="priority", max_num_seqs=1)
    scheduler.add_request(make_request("low", 4, priority=3, arrival=0))
    scheduler.add_request(make_request("high", 4, priority=1, arrival=1))
    assert step(scheduler).num_scheduled_tokens == {"high": 4}


def test_among_equals_priority_behaves_like_first_come_first_served() -> None:
    """n outputs of one prompt share priority and arrival: preempting the oldest of them would thrash."""
    served = {}
    for policy in ("fcfs", "priority"):
        scheduler = make_scheduler(num_blocks=10, policy=policy, caching=False)
        for name in "abcd":
            scheduler.add_request(make_request(name, 8, max_tokens=16))
        served[policy] = 0
        while scheduler.requests:
            served[policy] += step(scheduler).total_num_scheduled_tokens
    assert served["priority"] == served["fcfs"]


@pytest.mark.parametrize("when", ["waiting", "chunked", "running", "preempted"])
def test_abort_returns_all_blocks_whatever_the_request_is_doing(when: str) -> None:
    scheduler = make_scheduler(num_blocks=4, caching=False, max_num_batched_tokens=6)
    scheduler.add_request(make_request("a", 4, max_tokens=9))
    if when != "waiting":
        step(scheduler)
    scheduler.add_request(make_request("x", 8))
    if when == "chunked":
        step(scheduler)
        assert 0 < scheduler.requests["x"].num_computed_tokens < 8
    elif when in ("running", "preempted"):
        while scheduler.requests["x"].status < RequestStatus.RUNNING or scheduler.requests["x"].num_output_tokens < 1:
            step(scheduler)
        if when == "preempted":
            while scheduler.requests["x"].status is not RequestStatus.PREEMPTED:
                step(scheduler)
    assert scheduler.finish_requests(["x", "unknown"]) == ["x"]
    scheduler.check_invariants()
    while "a" in scheduler.requests:
        step(scheduler)
    assert scheduler.kv_cache.pool.num_free == 4


def test_a_live_id_cannot_be_added_twice() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("a", 4))
    with pytest.raises(ValueError, match="'a' is already in use"):
        scheduler.add_request(make_request("a", 4))


def test_stop_reasons() -> None:
    for params, tokens, expected in (
        ({"max_tokens": 2}, [7, 7], ("length", None)),
        ({"stop_token_ids": [9]}, [7, 9], ("stop", 9)),
        ({"stop_token_ids": [7], "min_tokens": 2}, [7, 7], ("stop", 7)),
    ):
        scheduler = make_scheduler()
        scheduler.add_request(make_request("a", 4, **params))
        for token in tokens:
            scheduled = scheduler.schedule()
            news = scheduler.update_from_output(sample(scheduler, scheduled, token))
        assert (news[0].finish_reason, news[0].stop_reason) == expected
        assert not scheduler.requests


def test_core_loads_no_tensor_library() -> None:
    code = "import sys, course_lib.core.scheduler; print([m for m in ('torch', 'numpy', 'jax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_step_of_256_requests_costs_less_than_a_millisecond() -> None:
    """The median is near 0.4 ms on a quiet core; the bound leaves room for a busy machine."""
    seconds = sorted(measure_steps(256, num_steps=64))
    assert seconds[len(seconds) // 2] < 5e-3


def run_ahead(scheduler: Scheduler, tokens: dict[str, list[int]]) -> list[str]:
    """Serve everything, each step being planned before the one in front is reported. `tokens`: what each request
    will be given, one after another. Returns which kind each plan was, "next" or "ahead"."""
    kinds: list[str] = []
    in_flight: SchedulerOutput | None = None
    will_sample: set[str] = set()

    def launch(scheduled: SchedulerOutput, kind: str) -> SchedulerOutput:
        kinds.append(kind)
        return scheduled

    while scheduler.has_work or in_flight:
        if in_flight is None:
            in_flight = launch(scheduler.schedule(), "next")
            will_sample = {i for i, r in scheduler.requests.items() if r.num_computed_tokens == r.num_tokens}
        step, sampling = in_flight, will_sample
        ahead = scheduler.schedule_ahead()
        in_flight = None if ahead is None else launch(ahead, "ahead")
        will_sample = set() if ahead is None else set(ahead.num_scheduled_tokens)
        ids = list(step.num_scheduled_tokens)
        output = ModelRunnerOutput(ids, [[tokens[i].pop(0)] if i in sampling else [] for i in ids])
        scheduler.update_from_output(output)
        scheduler.check_invariants()
    return kinds


def test_steps_planned_ahead_give_every_request_its_tokens() -> None:
    """Three requests of different lengths; nobody gets a token too many or too few, no block is lost."""
    for caching in (True, False):
        scheduler = make_scheduler(caching=caching)
        shapes = (("a", 5, 9), ("b", 8, 1), ("c", 3, 20))
        requests = [make_request(name, length, max_tokens=n) for name, length, n in shapes]
        for request in requests:
            scheduler.add_request(request)
        kinds = run_ahead(scheduler, {name: list(range(100, 200)) for name in "abc"})
        assert kinds.count("ahead") == 19, "after the prompts' step, every step can be planned ahead"
        assert [r.output_token_ids for r in requests] == [list(range(100, 100 + n)) for n in (9, 1, 20)]
        assert scheduler.kv_cache.pool.num_free == scheduler.kv_cache.pool.num_blocks


def test_a_stop_token_costs_one_dropped_token() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, max_tokens=9, stop_token_ids=[103])
    scheduler.add_request(request)
    given = {"a": list(range(100, 200))}
    run_ahead(scheduler, given)
    assert request.output_token_ids == [100, 101, 102, 103]
    assert given["a"][0] == 105, "the step in flight sampled once more"
    assert scheduler.kv_cache.pool.num_free == scheduler.kv_cache.pool.num_blocks


def test_nothing_is_planned_ahead_that_needs_the_tokens() -> None:
    for params in ({"repetition_penalty": 1.2}, {"min_tokens": 2}, {"logprobs": 1}, {"presence_penalty": 0.5}):
        scheduler = make_scheduler()
        scheduler.add_request(make_request("a", 5, **params))
        scheduler.schedule()
        assert scheduler.schedule_ahead() is None, params
    scheduler = make_scheduler(max_num_batched_tokens=16)  # a prompt in chunks
    scheduler.add_request(make_request("a", 20))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is None
    scheduler = make_scheduler(num_blocks=2)  # no block is left: someone may have to be preempted
    scheduler.add_request(make_request("a", 8))
    scheduler.schedule()
    assert scheduler.schedule_ahead() is None
    scheduler = make_scheduler()  # someone could be admitted
    scheduler.add_request(make_request("a", 8))
    scheduler.schedule()
    scheduler.add_request(make_request("b", 8))
    assert scheduler.schedule_ahead() is None


def test_an_aborted_request_and_a_new_one_of_its_name_do_not_mix() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("a", 5))
    scheduled = scheduler.schedule()
    scheduler.finish_requests(["a"])
    again = make_request("a", 6)
    scheduler.add_request(again)
    assert scheduler.update_from_output(ModelRunnerOutput(list(scheduled.num_scheduled_tokens), [[7]])) == []
    assert again.num_output_tokens == 0
