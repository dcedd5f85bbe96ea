"""What one engine step costs in Python: everything but the model, and the scheduler alone.

A step of R requests that each decode one token, text and output objects included. For the engine's step the model is
replaced at its call: no layer runs, and the logits are those of a small vocabulary, so that preparing inputs, the
sampler's bookkeeping, updating requests, detokenizing and building outputs are all that is left.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from course_lib.bench.engine_side import EngineOptions
from course_lib.bench.ledger import Row
from course_lib.bench.step_split import split_steps
from course_lib.config import SchedulerConfig
from course_lib.core.kv_cache_manager import KVCacheManager
from course_lib.core.messages import ModelRunnerOutput
from course_lib.core.request import Request
from course_lib.core.scheduler import Scheduler
from course_lib.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from course_lib.engine.llm_engine import LLMEngine

_BLOCK_SIZE = 16
_PROMPT = 32  # tokens, and up to 15 more: lengths differ, so that requests do not all fill a block in one step
_WARM_STEPS = 8
_TEXT_IDS = (280, 500)  # of the small vocabulary, those that are pieces of words in the course model's tokenizer


def measure_step_rows(options: EngineOptions, counts: list[int], *, num_steps: int, repeats: int) -> list[Row]:
    """For each number of running requests: ms of an engine's step with its split, and ms of the scheduler's part.

    A value is the median of `num_steps` steps; the mean over all of them has the garbage collector's pauses in it.
    """
    rows = []
    for count in tqdm(counts, desc="steps", leave=False):
        engine = _stubbed_engine(options, count, (repeats + 2) * (num_steps + _WARM_STEPS))
        _start_requests(engine, count)
        _timed_steps(engine, _WARM_STEPS)
        runs = [_timed_steps(engine, num_steps) for _ in range(repeats)]
        medians = [1e3 * statistics.median(run) for run in runs]
        mean = 1e3 * statistics.fmean(seconds for run in runs for seconds in run)
        with split_steps(engine) as split:
            _timed_steps(engine, num_steps)
        details = {"split_ms_per_step": split.per_step_ms(), "mean_ms": round(mean, 3)}
        rows.append(Row(str(count), "ms", medians, group="engine step without the model", details=details))
        del engine
    for count in counts:
        medians = [1e3 * statistics.median(measure_steps(count, num_steps)) for _ in range(repeats)]
        rows.append(Row(str(count), "ms", medians, group="scheduler alone"))
    return rows


def measure_steps(num_running: int, num_steps: int = 256) -> list[float]:
    """Seconds of `schedule()` plus `update_from_output()` in each of `num_steps` decode steps."""
    limits = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=64 * num_running,
        max_model_len=4096,
        enable_chunked_prefill=True,
        long_prefill_token_threshold=0,
        policy="fcfs",
    )
    blocks_each = -(-(64 + num_steps) // _BLOCK_SIZE)
    scheduler = Scheduler(limits, KVCacheManager(num_running * blocks_each, _BLOCK_SIZE))
    params = SamplingParams(max_tokens=num_steps + 2, ignore_eos=True)
    for i in range(num_running):
        scheduler.add_request(Request(str(i), _prompt(i), params))
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


def _prompt(index: int) -> list[int]:
    return list(range(index, index + _PROMPT + index % _BLOCK_SIZE))


def _stubbed_engine(options: EngineOptions, count: int, most_steps: int) -> LLMEngine:
    """An engine with room for `count` requests and one random layer, which is never run."""
    from course_lib.engine.llm_engine import LLMEngine
    from course_lib.engine_args import EngineArgs

    length = _PROMPT + _BLOCK_SIZE + most_steps
    arguments = options.arguments(
        load_format="dummy", hf_overrides={"num_hidden_layers": 1}, max_model_len=length, max_num_seqs=count,
        max_num_batched_tokens=64 * count, block_size=_BLOCK_SIZE,
        num_gpu_blocks_override=count * (length // _BLOCK_SIZE + 1),
    )  # fmt: skip
    engine = LLMEngine.from_engine_args(EngineArgs.from_kwargs(**arguments))
    _replace_model(engine.core.executor.runner, count)
    return engine


def _replace_model(runner: Any, rows: int) -> None:
    """Logits of `_TEXT_IDS[1]` tokens whose argmax is another piece of a word in every row, and in every other step."""
    import torch

    low, high = _TEXT_IDS
    tokens = [torch.arange(start, start + rows, device=runner.device) % (high - low) + low for start in (0, 17)]
    both = [torch.nn.functional.one_hot(ids, high).to(runner.dtype) for ids in tokens]
    hidden = torch.zeros(runner.config.scheduler.max_num_batched_tokens, 1, dtype=runner.dtype, device=runner.device)
    turn = [0]

    def logits_of(number: int) -> torch.Tensor:
        turn[0] ^= 1
        return both[turn[0]][:number]

    def replay(size: int) -> torch.Tensor:
        logits = logits_of(rows)
        runner.inputs.sampled.copy_(tokens[turn[0]])
        return logits

    model = vars(runner.model)
    model["forward"] = lambda input_ids, *rest, **more: hidden[: len(input_ids)]
    model["compute_logits"] = lambda states: logits_of(len(states))
    for graphs in getattr(runner, "graphs", None) or ():
        graphs.replay = replay


def _start_requests(engine: LLMEngine, count: int) -> None:
    """Add `count` requests and compute their prompts."""
    for i in range(count):
        prompt = _prompt(i)
        params = SamplingParams(
            temperature=0, max_tokens=engine.config.scheduler.max_model_len - len(prompt), ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        engine.add_request(str(i), prompt, params)
    running = 0
    while running < count:
        engine.step()
        running = len(engine.core.scheduler.running)


def _timed_steps(engine: LLMEngine, number: int) -> list[float]:
    """Seconds of each of `number` steps."""
    seconds = []
    for _ in range(number):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    return seconds
