"""This engine as the measured side: built once from the command line's options, run over a workload."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.bench.workloads import WorkItem, longest_sequence, output_tokens
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from course_lib import LLM


@dataclass(frozen=True)
class EngineOptions:
    """What may be chosen about the engine; None leaves it to the engine."""

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int = 2048
    max_num_seqs: int | None = None
    enforce_eager: bool = False

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of `LLM` and `EngineArgs`; `more` come on top. Token ids go in, and text comes out
        unless the model has no tokenizer."""
        named = {
            "dtype": self.dtype, "device": self.device, "max_model_len": self.max_model_len,
            "enforce_eager": self.enforce_eager, "disable_log_stats": True,
        }  # fmt: skip
        if self.max_num_seqs is not None:
            named["max_num_seqs"] = self.max_num_seqs
        if self.model is not None:
            named["model"] = self.model
        return named | more


def check_fits(items: list[WorkItem], options: EngineOptions) -> None:
    """Raises CourseError if a request is longer than `--max-model-len`."""
    longest = longest_sequence(items)
    if longest > options.max_model_len:
        raise CourseError(
            f"--max-model-len {options.max_model_len}: this workload's longest request has {longest} tokens; "
            f"raise it to at least that"
        )


def run_items(llm: LLM, items: list[WorkItem]) -> float:
    """Seconds to serve all items, arrivals ignored, without help from the prefix cache of an earlier run.

    Raises RuntimeError if not every request got all its tokens.
    """
    from course_lib import SamplingParams

    prompts = [item.prompt_token_ids for item in items]
    params = [SamplingParams(temperature=0, max_tokens=item.max_tokens, ignore_eos=True) for item in items]
    llm.reset_prefix_cache()
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    produced = sum(len(output.outputs[0].token_ids) for output in outputs)
    if produced != output_tokens(items):
        raise RuntimeError(f"{produced} tokens produced, {output_tokens(items)} expected")
    return seconds


def warm_up(llm: LLM, items: list[WorkItem]) -> None:
    """A few tokens of every prompt: lazy imports, compiled kernels, memory pages."""
    run_items(llm, [WorkItem(item.prompt_token_ids, min(item.max_tokens, 3)) for item in items])
