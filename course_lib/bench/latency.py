"""One request at a time: time to first token, time per output token, tokens/s.

TTFT runs from handing the request in to its first token being out; TPOT is the mean gap between tokens after that.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from course_lib.bench.engine_side import EngineOptions, check_fits, run_items, warm_up
from course_lib.bench.ledger import Row
from course_lib.bench.step_split import split_steps
from course_lib.bench.workloads import WorkItem, single

if TYPE_CHECKING:
    from course_lib import LLM


def measure_latency(options: EngineOptions, *, input_len: int, output_len: int, repeats: int) -> list[Row]:
    """Rows "TTFT" and "TPOT" in ms and "output rate" in tok/s; the last has the step split of a separate pass.

    `output_len` is at least 2: one token has no time per further token.
    """
    from course_lib import LLM

    llm = LLM(**options.arguments())
    items = single(llm.llm_engine.config.model.vocab_size, input_len=input_len, output_len=output_len)
    check_fits(items, options)
    warm_up(llm, items)
    runs = [_serve_one(llm, items[0]) for _ in tqdm(range(repeats), desc="latency", leave=False)]
    with split_steps(llm.llm_engine) as split:
        run_items(llm, items)
    details = {"split_ms_per_step": split.per_step_ms(), "split_steps": split.steps}
    return [
        Row("TTFT", "ms", [1e3 * ttft for ttft, _ in runs], details={"prompt_tokens": input_len}),
        Row("TPOT", "ms", [1e3 * (total - ttft) / (output_len - 1) for ttft, total in runs]),
        Row("output rate", "output tok/s", [output_len / total for _, total in runs], details=details),
    ]


def _serve_one(llm: LLM, item: WorkItem) -> tuple[float, float]:
    """(seconds to the first token, seconds to the last one)."""
    from course_lib import SamplingParams
    from course_lib.sampling_params import RequestOutputKind

    llm.reset_prefix_cache()
    engine: Any = llm.llm_engine
    params = SamplingParams(
        temperature=0, max_tokens=item.max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    started = time.perf_counter()
    engine.add_request("latency", item.prompt_token_ids, params)
    first = None
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs and first is None:
            first = time.perf_counter() - started
    return first, time.perf_counter() - started
