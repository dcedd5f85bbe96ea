"""`bench ladder`: what each of the engine's ideas brings on a GPU, in tokens/s and in achieved GB/s.

Rungs are climbed one after another on the same machine; transformers' continuous batching is measured in the same run,
and every row's limit is the roofline: the tokens/s at which the bytes of `traffic` would move at the copy bandwidth
measured first.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from course_lib.bench.ceilings import copy_bandwidth
from course_lib.bench.engine_side import EngineOptions, run_items
from course_lib.bench.ledger import Row
from course_lib.bench.rungs import RUNGS, engine_arguments, only
from course_lib.bench.traffic import bytes_moved, weight_bytes
from course_lib.bench.transformers_side import load_transformers, run_continuous
from course_lib.bench.workloads import WORKLOADS, WorkItem, nanovllm, output_tokens
from course_lib.errors import CourseError

_CACHE_BYTES = 16 << 30  # the same for every rung; holds 256 requests of 2,048 tokens of the course model
_PEER = "transformers, continuous batching"


def measure_ladder(
    options: EngineOptions,
    workloads: list[str],
    *,
    num_prompts: int | None,
    peer_output: int,
    cell_seconds: int,
    repeats: int,
) -> list[Row]:
    """One row per workload and rung, then the peer's. Raises CourseError without a GPU."""
    if not torch.cuda.is_available() or options.device == "cpu":
        raise CourseError(
            "bench ladder needs an NVIDIA GPU (CUDA graphs and compiled Triton kernels are its rungs): run it on one, "
            "or measure this machine with `bench throughput` and `bench kernels`"
        )
    copy = copy_bandwidth(torch.device("cuda"), repeats)
    rows = [Row("copy", "GB/s", copy, group="ceiling")]
    ladder = Ladder(options, sorted(copy)[len(copy) // 2], cell_seconds, repeats)
    cells: dict[str, list[Row]] = {name: [] for name in workloads}
    llm, built = None, None
    bar = tqdm(total=len(workloads) * (len(RUNGS) + 1), desc="ladder", leave=False)
    for rung in RUNGS:
        if engine_arguments(rung) != built:
            llm = None
            _free()
            llm, built = ladder.engine(rung), engine_arguments(rung)
        with only(llm, rung):
            for name in workloads:
                cells[name].append(ladder.climb(llm, rung, name, _items(name, num_prompts, llm)))
                bar.update()
    config = llm.llm_engine.config
    items = {name: _items(name, num_prompts, llm, peer_output) for name in workloads}
    llm = None
    _free()
    model = load_transformers(config)
    for name in workloads:
        cells[name].append(ladder.peer(model, name, items[name], peer_output))
        bar.update()
    bar.close()
    return rows + [row for name in workloads for row in cells[name]]


class Ladder:
    """Args: `copy` GB/s; `cell_seconds`, after which a row gets no further repeat."""

    def __init__(self, options: EngineOptions, copy: float, cell_seconds: int, repeats: int) -> None:
        self.options, self.copy, self.cell_seconds, self.repeats = options, copy, cell_seconds, repeats

    def engine(self, rung: str) -> Any:
        from course_lib import LLM

        more = engine_arguments(rung) | {"kv_cache_memory_bytes": _CACHE_BYTES}
        return LLM(**(self.options.arguments() | more))

    def climb(self, llm: Any, rung: str, workload: str, items: list[WorkItem]) -> Row:
        """Tokens/s of one rung on one workload; the roofline as its limit."""
        run_items(llm, [WorkItem(item.prompt_token_ids, 2) for item in items[:64]])
        core = llm.llm_engine.core
        steps = [0]
        step = core.step

        def counted() -> Any:
            steps[0] += 1
            return step()

        core.step = counted
        try:
            seconds = self._repeat(lambda: run_items(llm, items))
        finally:
            del core.step
        config = llm.llm_engine.config
        moved = bytes_moved(
            items, steps[0] // len(seconds), weight_bytes(core.executor.runner.model), config.model.kv_bytes_per_token
        )
        tokens = output_tokens(items)
        middle = sorted(seconds)[len(seconds) // 2]
        details = {"steps": steps[0] // len(seconds), "gigabytes": round(moved / 1e9, 2),
                   "achieved_gb_s": round(moved / middle / 1e9, 1)}  # fmt: skip
        limit = tokens / (moved / (self.copy * 1e9))
        return Row(rung, "output tok/s", [tokens / s for s in seconds], group=workload, limit=limit, details=details)

    def peer(self, model: Any, workload: str, items: list[WorkItem], cap: int) -> Row:
        """transformers' continuous batching on the same prompts; of nanovllm's, outputs are capped."""
        run_continuous(model, [WorkItem(item.prompt_token_ids, 2) for item in items[:64]])
        tokens = output_tokens(items)
        seconds = self._repeat(lambda: run_continuous(model, items))
        details = {"longest_output": cap} if workload == "nanovllm" else {}
        return Row(_PEER, "output tok/s", [tokens / s for s in seconds], group=workload, details=details)

    def _repeat(self, run: Callable[[], float]) -> list[float]:
        started = time.perf_counter()
        seconds = [run()]
        while len(seconds) < self.repeats and time.perf_counter() - started < self.cell_seconds:
            seconds.append(run())
        return seconds


def _items(name: str, num_prompts: int | None, llm: Any, longest_output: int = 1024) -> list[WorkItem]:
    vocab_size = llm.llm_engine.config.model.vocab_size
    cut = {} if num_prompts is None or name == "single" else {"num_prompts": num_prompts}
    if name == "nanovllm":
        return nanovllm(vocab_size, longest_output=longest_output, **cut)
    return WORKLOADS[name](vocab_size, **cut)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
