"""Output tokens per second of many prompts at once: this engine, and transformers' static batching.

Both sides get the same weights, dtype, threads and prompts, and produce the same number of tokens; the
repeats are interleaved, so that a machine that slows down slows down for both.
"""

from __future__ import annotations

import time
from typing import Any

from course_lib.bench.workloads import random_prompts


def measure_throughput(
    *,
    model: str | None,
    dtype: str,
    num_prompts: int,
    input_len: tuple[int, int],
    output_len: int,
    repeats: int,
    peer: str | None,
) -> dict[str, list[float]]:
    """Output tokens/s of each repeat, by side ("course_lib", and the peer if one is named).

    `input_len`: shortest and longest prompt, in tokens; lengths are uniform in between.
    """
    from course_lib import LLM

    named = {} if model is None else {"model": model}
    llm = LLM(**named, dtype=dtype, max_model_len=2048)
    config = llm.llm_engine.config
    prompts = random_prompts(num_prompts, *input_len, config.model.vocab_size)
    hf_model = _load_transformers(config) if peer == "transformers" else None
    results: dict[str, list[float]] = {"course_lib": []}
    _run_engine(llm, prompts, 2)  # both sides warm up: lazy imports, memory pages
    if hf_model is not None:
        results["transformers"] = []
        _run_transformers(hf_model, prompts, 2)
    for _ in range(repeats):
        results["course_lib"].append(num_prompts * output_len / _run_engine(llm, prompts, output_len))
        if hf_model is not None:
            seconds = _run_transformers(hf_model, prompts, output_len)
            results["transformers"].append(num_prompts * output_len / seconds)
    return results


def _run_engine(llm: Any, prompts: list[list[int]], output_len: int) -> float:
    """Seconds, without help from the prefix cache of an earlier repeat."""
    from course_lib import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    produced = sum(len(output.outputs[0].token_ids) for output in outputs)
    if produced != len(prompts) * output_len:
        raise RuntimeError(f"{produced} tokens produced, {len(prompts) * output_len} expected")
    return seconds


def _load_transformers(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.model.dtype)
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype).eval().to(config.device)


def _run_transformers(model: Any, prompts: list[list[int]], output_len: int) -> float:
    """Seconds for one left-padded static batch."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=output_len, min_new_tokens=output_len, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - started
