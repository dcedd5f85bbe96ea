"""Ranks that share every layer, alone and in a pipeline: whatever the scheduler does, every request's tokens are right.

The schedules of `test_schedules`, driven through ranks that really hold their parts and really add them up. Each rank
keeps its own account of the requests, and samples for itself: all of them must always agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from course_lib.config import EngineConfig
from course_lib.engine import core as engine_core
from course_lib.parallel.layout import ParallelLayout
from tests.engine.conftest import MAX_MODEL_LEN, save_tiny_llama
from tests.engine.test_schedules import Schedule, compare, crowded, run, schedules
from tests.engine.thread_ranks import RankThreads, ThreadedExecutor
from tests.oracle import Oracle

NUM_SCHEDULES = int(os.environ.get("COURSE_SCHEDULES", "8"))
LAYOUTS_AND_KV_HEADS = {
    "tensor": (ParallelLayout(tensor=3), 3),  # as the course model has
    "more ranks than KV heads": (ParallelLayout(tensor=2), 1),
    "tensor and pipeline": (ParallelLayout(tensor=3, pipeline=2), 3),
}


@pytest.fixture(scope="module", params=LAYOUTS_AND_KV_HEADS.values(), ids=LAYOUTS_AND_KV_HEADS)
def shape(request: pytest.FixtureRequest) -> tuple[ParallelLayout, int]:
    return request.param


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory, shape: tuple[ParallelLayout, int]) -> Path:
    """Two layers, and a vocabulary that no number of ranks divides."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("model"), 2, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=shape[1],
    )  # fmt: skip


@pytest.fixture(scope="module")
def oracle(model_path: Path) -> Oracle:
    return Oracle(str(model_path), MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def ranks(shape: tuple[ParallelLayout, int]) -> Iterator[RankThreads]:
    threads = RankThreads(shape[0])
    yield threads
    threads.close()


def run_on(ranks: RankThreads, path: Path, schedule: Schedule) -> tuple[dict, int, int]:
    """Results, how many preemptions there were, and the most steps in flight."""
    made: list[ThreadedExecutor] = []

    def make(config: EngineConfig) -> ThreadedExecutor:
        made.append(ThreadedExecutor(config, ranks))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_core, "make_executor", make)
        patch.setenv("COURSE_DEBUG", "1")
        layout = ranks.layout
        results, preemptions = run(
            path, schedule, tensor_parallel_size=layout.tensor, pipeline_parallel_size=layout.pipeline
        )
    return results, preemptions, made[0].most_in_flight


@settings(
    max_examples=NUM_SCHEDULES,
    deadline=None,
    derandomize="COURSE_SCHEDULES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(schedule=schedules())
def test_random_schedules_match_the_oracle(
    ranks: RankThreads, model_path: Path, oracle: Oracle, schedule: Schedule
) -> None:
    results, *_ = run_on(ranks, model_path, schedule)
    compare(oracle, schedule, results)


def test_schedules_really_preempt(ranks: RankThreads, model_path: Path, oracle: Oracle) -> None:
    """The property above would be empty if no cache ever filled, or no stage ever had company."""
    schedule = crowded(temperature=1.3, seed=3)
    results, preemptions, in_flight = run_on(ranks, model_path, schedule)
    assert preemptions > 0 and in_flight == ranks.layout.pipeline
    compare(oracle, schedule, results)
