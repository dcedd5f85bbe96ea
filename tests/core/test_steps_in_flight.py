"""The scheduler of a pipeline: steps are planned before the results of others are known."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest

from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import ModelRunnerOutput, SchedulerOutput
from course_lib.core.request import RequestStatus
from course_lib.core.scheduler import Scheduler
from tests.core.paper_pipeline import VOCAB, PaperPipeline, continuation
from tests.core.test_scheduler import Limits, make_request, sample


def make_scheduler(
    steps: int = 2, num_blocks: int = 64, block_size: int = 4, caching: bool = True, **limits
) -> Scheduler:
    cache = KVCacheManager(num_blocks, block_size, caching)
    return Scheduler(Limits(**limits), cache, steps, tells_tokens=steps > 1)


def plan(scheduler: Scheduler) -> SchedulerOutput:
    scheduled = scheduler.schedule()
    scheduler.check_invariants(scheduled)
    return scheduled


def answer(scheduler: Scheduler, scheduled: SchedulerOutput, token: int | None = 7, **more) -> list:
    """Report one token for everybody in the step; None: nobody has one yet."""
    ids = list(scheduled.num_scheduled_tokens)
    news = scheduler.update_from_output(ModelRunnerOutput(ids, [[] if token is None else [token]] * len(ids), **more))
    scheduler.check_invariants()
    return news


def test_a_request_whose_token_is_in_flight_sits_out() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("a", 5))
    first = plan(scheduler)
    assert first.num_scheduled_tokens == {"a": 5}
    assert plan(scheduler).is_empty
    answer(scheduler, first)
    assert plan(scheduler).num_scheduled_tokens == {"a": 1}


def test_a_prompt_goes_on_while_its_last_chunk_is_in_flight() -> None:
    scheduler = make_scheduler(steps=3, max_num_batched_tokens=16)
    scheduler.add_request(make_request("a", 40))
    steps = [plan(scheduler) for _ in range(3)]
    assert [step.num_scheduled_tokens["a"] for step in steps] == [16, 16, 8]
    assert plan(scheduler).is_empty
    answer(scheduler, steps[0], None)
    assert plan(scheduler).is_empty
    answer(scheduler, steps[1], None)
    answer(scheduler, steps[2])
    assert plan(scheduler).num_scheduled_tokens == {"a": 1}


@pytest.mark.parametrize(("steps", "requests"), [(2, 8), (2, 7), (3, 10), (4, 3)])
def test_requests_are_dealt_out_evenly_and_take_turns(steps: int, requests: int) -> None:
    scheduler = make_scheduler(steps)
    for i in range(requests):
        scheduler.add_request(make_request(str(i), 3, max_tokens=100))
    in_flight = []
    served: Counter[str] = Counter()
    for _ in range(20 * steps):
        while len(in_flight) < steps and not (scheduled := plan(scheduler)).is_empty:
            assert len(scheduled.num_scheduled_tokens) <= -(-requests // steps)
            served.update(scheduled.num_scheduled_tokens.keys())
            in_flight.append(scheduled)
        assert len(in_flight) == min(steps, requests), "a stage has nothing to do"
        answer(scheduler, in_flight.pop(0))
    assert max(served.values()) - min(served.values()) <= 1


def test_those_left_are_dealt_out_anew() -> None:
    """All requests of one step end: those of the other are shared out, or one stage would idle from now on."""
    scheduler = make_scheduler()
    for i in range(8):
        scheduler.add_request(make_request(str(i), 3, max_tokens=1 if i < 4 else 9))
    first, second = plan(scheduler), plan(scheduler)
    answer(scheduler, first)
    assert plan(scheduler).finished_request_ids == {"0", "1", "2", "3"}
    answer(scheduler, second)
    assert [list(plan(scheduler).num_scheduled_tokens) for _ in range(2)] == [["4", "5"], ["6", "7"]]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_no_stage_idles(stages: int) -> None:
    """By a virtual clock: a stage takes 1 for a step and 0.03 for each token in it. The outputs differ in length."""
    scheduler = make_scheduler(stages, num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=4096)
    for i in range(48):
        scheduler.add_request(make_request(str(i), 30, max_tokens=20 + i % 20))
    now, busy = 0.0, 0.0
    free_at = [0.0] * stages
    in_flight: list[tuple[float, SchedulerOutput, ModelRunnerOutput]] = []
    while scheduler.has_work or in_flight:
        while len(in_flight) < stages and not (scheduled := plan(scheduler)).is_empty:
            done, takes = now, 1 + 0.03 * scheduled.total_num_scheduled_tokens
            for stage in range(stages):
                done = free_at[stage] = max(done, free_at[stage]) + takes
            busy += takes * stages
            in_flight.append((done, scheduled, sample(scheduler, scheduled)))
        done, scheduled, output = in_flight.pop(0)
        now = max(now, done)
        scheduler.update_from_output(output)
    assert busy / (stages * now) > 0.85


def test_a_long_prompt_does_not_take_the_turns_of_others() -> None:
    scheduler = make_scheduler(steps=2, num_blocks=256, max_num_batched_tokens=16)
    scheduler.add_request(make_request("long", 400))
    first = plan(scheduler)
    for name in "abc":
        scheduler.add_request(make_request(name, 2))
    second = plan(scheduler)
    answer(scheduler, first, None)
    scheduler.config.max_num_batched_tokens = 24  # room beside the chunk, which stays at 16
    scheduler.config.long_prefill_token_threshold = 16
    third = plan(scheduler)
    assert second.num_scheduled_tokens == {"long": 16} and third.num_scheduled_tokens == {"long": 16, "a": 2, "b": 2}
    answer(scheduler, second, None)
    fourth = plan(scheduler)
    assert fourth.num_scheduled_tokens == {"long": 16, "c": 2}
    answer(scheduler, third)
    assert plan(scheduler).num_scheduled_tokens == {"long": 16, "a": 1, "b": 1}


def test_stages_are_told_what_was_sampled() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("a", list(range(100, 105))))
    assert plan(scheduler).cached_requests.new_token_ids == []
    scheduler.update_from_output(ModelRunnerOutput(["a"], [[41]]))
    assert plan(scheduler).cached_requests.new_token_ids == [[41]]
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add_request(make_request("a", list(range(100, 107))))
    plan(scheduler)
    assert plan(scheduler).cached_requests.new_token_ids == [[]], "of a prompt they know everything"


def test_a_single_process_is_told_nothing_that_it_knows() -> None:
    scheduler = make_scheduler(steps=1)
    scheduler.add_request(make_request("a", 5))
    for _ in range(2):
        scheduled = plan(scheduler)
        answer(scheduler, scheduled)
    assert scheduled.cached_requests.request_ids == ["a"] and scheduled.cached_requests.new_token_ids == []


def crowd(max_tokens: int) -> tuple[Scheduler, SchedulerOutput, SchedulerOutput]:
    """Two requests in a full cache; "b" is in flight in the first step returned, and preempted by the second."""
    scheduler = make_scheduler(num_blocks=4, caching=False)
    scheduler.add_request(make_request("a", 8))
    scheduler.add_request(make_request("b", 8, max_tokens=max_tokens))
    first, second = plan(scheduler), plan(scheduler)
    assert (first.num_scheduled_tokens, second.num_scheduled_tokens) == ({"a": 8}, {"b": 8})
    answer(scheduler, first, 1)
    third = plan(scheduler)  # a needs a third block
    assert third.num_scheduled_tokens == {"a": 1} and third.preempted_request_ids == {"b"}
    return scheduler, second, third


def test_a_token_that_comes_after_the_preemption_counts() -> None:
    scheduler, second, third = crowd(max_tokens=5)
    (news,) = answer(scheduler, second, 2)
    assert (news.request_id, news.new_token_ids, news.finish_reason) == ("b", [2], None)
    b = scheduler.requests["b"]
    assert b.status is RequestStatus.PREEMPTED and b.output_token_ids == [2] and b.num_computed_tokens == 0
    answer(scheduler, third, 3)
    while "a" in scheduler.requests:
        scheduled = plan(scheduler)
        answer(scheduler, scheduled)
    scheduled = plan(scheduler)
    assert scheduled.num_scheduled_tokens == {"b": 9} and scheduled.new_requests[0].output_token_ids == [2]


def test_a_last_token_that_comes_after_the_preemption_ends_the_request() -> None:
    scheduler, second, _ = crowd(max_tokens=1)
    (news,) = answer(scheduler, second, 2)
    assert news.finish_reason == "length"
    assert "b" not in scheduler.requests and not scheduler.waiting


def test_an_error_that_comes_after_the_preemption_ends_the_request() -> None:
    scheduler, second, _ = crowd(max_tokens=5)
    (news,) = answer(scheduler, second, 2, errors={"b": "on purpose"})
    assert (news.finish_reason, news.stop_reason, news.new_token_ids) == ("abort", "on purpose", [])
    assert "b" not in scheduler.requests and not scheduler.waiting


def test_results_for_a_request_that_has_ended_do_not_reach_its_namesake() -> None:
    scheduler = make_scheduler(steps=3, caching=False, max_num_batched_tokens=8)
    scheduler.add_request(make_request("a", 20))
    old = [plan(scheduler), plan(scheduler)]
    scheduler.finish_requests(["a"])
    again = make_request("a", 6)
    scheduler.add_request(again)
    new = plan(scheduler)
    assert new.finished_request_ids == {"a"} and new.num_scheduled_tokens == {"a": 6}
    assert answer(scheduler, old[0], 1, errors={"a": "of the old one"}) == []
    assert answer(scheduler, old[1], 1) == []
    (news,) = answer(scheduler, new, 2)
    assert (news.request_id, news.new_token_ids, again.output_token_ids) == ("a", [2], [2])


@pytest.mark.parametrize("seed", range(int(os.environ.get("COURSE_SCHEDULES", "120"))))
def test_no_stage_ever_finds_a_wrong_slot(seed: int) -> None:
    """Random arrivals, aborts, shared prefixes, chunks and tiny caches, with stages that lag behind at random."""
    random = Random(seed)
    steps, block_size = random.randint(2, 4), random.choice([1, 2, 4])
    smallest = -(-40 // block_size)
    max_num_seqs = random.randint(1, 6)
    chunked = random.random() < 0.7
    scheduler = make_scheduler(
        steps, random.randint(smallest, 2 * smallest), block_size, random.random() < 0.7,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=random.randint(max_num_seqs, 30) if chunked else 40,
        max_model_len=40, enable_chunked_prefill=chunked, policy=random.choice(["fcfs", "priority"]),
    )  # fmt: skip
    pipeline = PaperPipeline(random.randint(2, 4), block_size, random)
    in_flight: list[SchedulerOutput] = []
    expected: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    left, names = random.randint(1, 14), iter(range(1000))
    while left or scheduler.has_work or in_flight:
        if left and random.random() < 0.5:
            left -= 1
            tail = random.choices(range(VOCAB), k=random.randint(1, 4))
            prompt = [random.randrange(3)] * random.randint(0, 14) + tail
            count = random.randint(1, 20)
            name = str(next(names))
            scheduler.add_request(make_request(name, prompt, count, random.randint(0, 2)))
            expected[name], got[name] = continuation(prompt, count), []
        if scheduler.requests and random.random() < 0.05:
            name = random.choice(list(scheduler.requests))
            scheduler.finish_requests([name])
            expected[name] = expected[name][: len(got[name])]
        while len(in_flight) < steps and not (scheduled := plan(scheduler)).is_empty:
            pipeline.submit(scheduled)
            in_flight.append(scheduled)
            if random.random() < 0.3:
                break
        if in_flight:
            in_flight.pop(0)
            for news in scheduler.update_from_output(pipeline.result()):
                got[news.request_id] += news.new_token_ids
            scheduler.check_invariants()
    assert got == expected
    assert scheduler.kv_cache.pool.num_free == scheduler.kv_cache.pool.num_blocks
