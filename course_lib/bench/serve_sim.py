"""Serving as users see it: requests arrive at random times, every token is streamed, percentiles of what each waited.

Requests arrive as a Poisson process at a given rate, whatever the engine does (an open loop: a slow engine gets a
queue, not fewer requests). TTFT and end-to-end time count from the arrival, so queueing is in them.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from course_lib.bench.engine_side import EngineOptions, check_fits
from course_lib.bench.ledger import Row
from course_lib.bench.workloads import WorkItem, output_tokens, poisson

if TYPE_CHECKING:
    from course_lib.engine.async_llm import AsyncLLM

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Served:
    """Seconds of one request, from its arrival."""

    first_token: float
    last_token: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Mean gap between tokens after the first; 0 for a single token."""
        return (self.last_token - self.first_token) / max(1, self.tokens - 1)


def measure_serving(options: EngineOptions, *, rate: float, num_prompts: int, repeats: int) -> list[Row]:
    """Rows p50, p90 and p99 of each group in ms, and "output rate" in tok/s."""
    from course_lib.engine.async_llm import AsyncLLM
    from course_lib.engine_args import AsyncEngineArgs

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_kwargs(**options.arguments()))
    items = poisson(engine.config.model.vocab_size, rate=rate, num_prompts=num_prompts)
    check_fits(items, options)
    return asyncio.run(_measure(engine, items, repeats))


async def _measure(engine: AsyncLLM, items: list[WorkItem], repeats: int) -> list[Row]:
    try:
        await simulate(engine, [WorkItem(i.prompt_token_ids, min(3, i.max_tokens)) for i in items], "warm")
        runs, rates = [], []
        for repeat in tqdm(range(repeats), desc="serve-sim", leave=False):
            await engine.reset_prefix_cache()
            started = time.perf_counter()
            runs.append(await simulate(engine, items, str(repeat)))
            rates.append(output_tokens(items) / (time.perf_counter() - started))
    finally:
        engine.shutdown()
    quantities = {
        "TTFT": [[served.first_token for served in run] for run in runs],
        "TPOT": [[served.per_token for served in run] for run in runs],
        "end-to-end": [[served.last_token for served in run] for run in runs],
    }
    rows = [
        Row(f"p{p}", "ms", [1e3 * percentile(seconds, p) for seconds in by_run], group=name)
        for name, by_run in quantities.items()
        for p in PERCENTILES
    ]
    offered = output_tokens(items) / items[-1].arrival_s
    return [*rows, Row("output rate", "output tok/s", rates, details={"offered_tok_s": round(offered, 1)})]


async def simulate(engine: AsyncLLM, items: list[WorkItem], tag: str) -> list[Served]:
    """Serve all items, each from its arrival time on. `tag` keeps request ids apart from those of other runs."""
    started = time.perf_counter()
    tasks = [asyncio.create_task(_client(engine, item, f"{tag}-{i}", started)) for i, item in enumerate(items)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:  # Ctrl-C, or one failed: the others stop too
            task.cancel()


async def _client(engine: AsyncLLM, item: WorkItem, request_id: str, started: float) -> Served:
    from course_lib.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=item.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    arrival = started + item.arrival_s
    await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
    first, count = None, 0
    async for output in engine.generate(item.prompt_token_ids, params, request_id):
        count += len(output.outputs[0].token_ids)
        if first is None:
            first = time.perf_counter() - arrival
    if count != item.max_tokens:
        raise RuntimeError(f"request {request_id}: {count} tokens came, {item.max_tokens} expected")
    return Served(first, time.perf_counter() - arrival, count)


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
