"""What the scheduler itself costs: `schedule()` plus `update_from_output()` per decode step, no model."""

from __future__ import annotations

import time

from course_lib.config import SchedulerConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import ModelRunnerOutput
from course_lib.core.request import Request
from course_lib.core.scheduler import Scheduler
from course_lib.sampling_params import SamplingParams


def measure_steps(num_running: int, num_steps: int = 256) -> list[float]:
    """Seconds of each of `num_steps` decode steps with `num_running` requests."""
    limits = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=64 * num_running,
        max_model_len=4096,
        enable_chunked_prefill=True,
        long_prefill_token_threshold=0,
        policy="fcfs",
    )
    blocks_each = -(-(64 + num_steps) // 16)
    scheduler = Scheduler(limits, KVCacheManager(num_running * blocks_each, 16))
    params = SamplingParams(max_tokens=num_steps + 2, ignore_eos=True)
    for i in range(num_running):
        # Lengths differ, so that the requests do not all fill a block in the same step.
        scheduler.add_request(Request(str(i), list(range(i, i + 32 + i % 16)), params))
    scheduler.schedule()
    output = ModelRunnerOutput([r.request_id for r in scheduler.running], [[7]] * num_running)
    scheduler.update_from_output(output)
    seconds = []
    for _ in range(num_steps):
        started = time.perf_counter()
        scheduler.schedule()
        scheduler.update_from_output(output)
        seconds.append(time.perf_counter() - started)
    return seconds
