"""What the prefix cache is worth when prompts share their beginning, and what it costs when they do not.

Two engines of one model, one with `enable_prefix_caching` and one without, take turns in the same run. On the
workload "shared-prefix": the time to the first token of single requests whose prompt is mostly shared, and the
throughput of all requests at once, with the hit rate beside what the prompts themselves say it must be. On prompts
that share nothing: the time spent in scheduling, of which the cache's bookkeeping is a part.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from course_lib.bench.engine_side import EngineOptions, check_fits, run_items, warm_up
from course_lib.bench.ledger import Row
from course_lib.bench.step_split import split_steps
from course_lib.bench.workloads import SHARED_TOKENS, WorkItem, output_tokens, reusable_tokens, shared_prefix, uniform

if TYPE_CHECKING:
    from course_lib import LLM

WITH, WITHOUT = "with caching", "without"
_SINGLES = 10  # requests of the workload that are also served one after another, four of five with the prefix
_UNSHARED_OUTPUT = 16  # new tokens per prompt: each request fills one block while it decodes
_GPU_SHARE = 0.4  # of the memory, for each of the two engines


def measure_prefix_caching(options: EngineOptions, *, num_prompts: int, output_len: int, repeats: int) -> list[Row]:
    """Rows "with caching" and "without" with their ratio, in the groups "TTFT" and "throughput"; "hit rate", measured
    and computed; "nothing shared". `num_prompts` is at least 5, so that both kinds of prompt are among them."""
    sides = {name: _engine(options, caching=name == WITH) for name in (WITH, WITHOUT)}
    config = sides[WITH].llm_engine.config
    vocab_size = config.model.vocab_size
    shared = shared_prefix(vocab_size, num_prompts=num_prompts, output_len=output_len)
    unshared = uniform(vocab_size, num_prompts=num_prompts, output_len=_UNSHARED_OUTPUT)
    check_fits(shared, options)
    for llm in sides.values():
        warm_up(llm, shared[:2])
        warm_up(llm, unshared)
    ttft: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    bookkeeping: dict[str, list[float]] = {name: [] for name in sides}
    step: dict[str, list[float]] = {name: [] for name in sides}
    hit_rates = []
    for _ in tqdm(range(repeats), desc="prefix-caching", leave=False):
        for name, llm in sides.items():
            ttft[name].append(1e3 * _time_to_first_token(llm, shared[:_SINGLES]))
        for name, llm in sides.items():
            before = _lookups(llm)
            seconds[name].append(run_items(llm, shared))
            if name == WITH:
                queried, hit = (now - then for now, then in zip(_lookups(llm), before, strict=True))
                hit_rates.append(hit / queried)
        for name, llm in sides.items():
            with split_steps(llm.llm_engine) as split:
                run_items(llm, unshared)
            bookkeeping[name].append(split.per_step_ms()["schedule"])
            step[name].append(sum(split.per_step_ms().values()))
    rates = {name: [output_tokens(shared) / s for s in taken] for name, taken in seconds.items()}
    ttft_ratios = [a / b for a, b in zip(ttft[WITHOUT], ttft[WITH], strict=True)]
    rate_ratios = [a / b for a, b in zip(rates[WITH], rates[WITHOUT], strict=True)]
    computed = reusable_tokens(shared, config.cache.block_size) / sum(len(item.prompt_token_ids) for item in shared)
    costs = [(a - b) / s for a, b, s in zip(bookkeeping[WITH], bookkeeping[WITHOUT], step[WITHOUT], strict=True)]
    return [
        *_compared("TTFT", "ms", ttft, ttft_ratios),
        *_compared("throughput", "output tok/s", rates, rate_ratios),
        Row("measured", "%", [100 * rate for rate in hit_rates], group="hit rate"),
        Row("computed", "%", [100 * computed], group="hit rate"),
        *(Row(f"scheduling, {name}", "ms per step", bookkeeping[name], group="nothing shared") for name in sides),
        Row("the cache's part of a step", "%", [100 * cost for cost in costs], group="nothing shared",
            details={"step_ms": {name: round(statistics.median(taken), 3) for name, taken in step.items()}}),
    ]  # fmt: skip


def _engine(options: EngineOptions, *, caching: bool) -> LLM:
    import torch

    from course_lib import LLM

    more: dict[str, Any] = {"enable_prefix_caching": caching}
    if options.device != "cpu" and torch.cuda.is_available():
        more["gpu_memory_utilization"] = _GPU_SHARE
    return LLM(**options.arguments(**more))


def _time_to_first_token(llm: LLM, items: list[WorkItem]) -> float:
    """Median seconds, of requests served one after another, over those that have the shared prefix."""
    from course_lib import SamplingParams

    prefix = statistics.mode(tuple(item.prompt_token_ids[:SHARED_TOKENS]) for item in items)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    llm.reset_prefix_cache()
    seconds = []
    for item in items:
        started = time.perf_counter()
        llm.generate([item.prompt_token_ids], params, use_tqdm=False)
        if tuple(item.prompt_token_ids[:SHARED_TOKENS]) == prefix:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _lookups(llm: LLM) -> tuple[int, int]:
    """(tokens looked up, tokens found) since the engine started."""
    stats = llm.llm_engine.core.scheduler.kv_cache.stats
    return stats.queried_tokens, stats.hit_tokens


def _compared(group: str, unit: str, values: dict[str, list[float]], ratios: list[float]) -> list[Row]:
    """Both sides, and how many times better it is with caching, by repeat."""
    sides = [Row(name, unit, taken, group=group) for name, taken in values.items()]
    return [*sides, Row("better", "times", ratios, group=group)]
