"""Output tokens per second of many prompts at once: this engine, and transformers' static or continuous batching.

The repeats are interleaved, so that a machine that slows down slows down for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from course_lib.bench.engine_side import EngineOptions, check_fits, run_items, warm_up
from course_lib.bench.ledger import Row
from course_lib.bench.step_split import split_steps
from course_lib.bench.transformers_side import load_transformers, run_peer
from course_lib.bench.workloads import WorkItem, output_tokens

_SHARED_GPU = 0.4  # of the memory, when a peer needs its own


def measure_throughput(
    options: EngineOptions, make_items: Callable[[int], list[WorkItem]], *, repeats: int, peer: str | None
) -> list[Row]:
    """One row per side, in output tok/s; the engine's has the step split of a separate pass.

    `make_items`: from the vocabulary's size to the workload.
    """
    from course_lib import LLM

    llm = LLM(**options.arguments(**_memory_share(peer, options)))
    config = llm.llm_engine.config
    items = make_items(config.model.vocab_size)
    check_fits(items, options)
    sides: dict[str, Callable[[list[WorkItem]], float]] = {"course_lib": lambda work: run_items(llm, work)}
    if peer is not None:
        model = load_transformers(config)
        sides[peer] = lambda work: run_peer(peer, model, work)
    warm_up(llm, items)
    for name in list(sides)[1:]:
        sides[name]([WorkItem(item.prompt_token_ids, 2) for item in items])
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(repeats), desc="throughput", leave=False):
        for name, run in sides.items():
            seconds[name].append(run(items))
    with split_steps(llm.llm_engine) as split:
        run_items(llm, items)
    facts: dict[str, dict[str, Any]] = {
        "course_lib": {"split_ms_per_step": split.per_step_ms(), "split_steps": split.steps}
    }
    count = output_tokens(items)
    return [
        Row(name, "output tok/s", [count / s for s in taken], group="throughput", details=facts.get(name, {}))
        for name, taken in seconds.items()
    ]


def _memory_share(peer: str | None, options: EngineOptions) -> dict[str, Any]:
    import torch

    if peer is None or options.device == "cpu" or not torch.cuda.is_available():
        return {}
    return {"gpu_memory_utilization": _SHARED_GPU}
