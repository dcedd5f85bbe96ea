"""transformers as the other side: static batching (`generate`) and continuous batching (`generate_batch`'s manager).

Same weights, dtype, device, threads and prompts as the engine, and the same number of tokens per prompt. What either
needs to start (its cache, its warm-up, its graphs) is left out of the time, as the engine's own start is.
"""

from __future__ import annotations

import time
from typing import Any

from course_lib.bench.workloads import WorkItem

PEERS = ("transformers", "transformers-continuous")
_CPU_PAGE = 256  # tokens


def load_transformers(config: Any) -> Any:
    """The model of an `EngineConfig`, in its dtype, on its device."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.model.dtype)
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=dtype).eval().to(config.device)


def run_peer(peer: str, model: Any, items: list[WorkItem]) -> float:
    """Seconds for all items."""
    return (run_static if peer == "transformers" else run_continuous)(model, items)


def run_static(model: Any, items: list[WorkItem]) -> float:
    """One left-padded batch, which runs until the longest output is done: a static batch has no other end."""
    import torch

    prompts = [item.prompt_token_ids for item in items]
    steps = max(item.max_tokens for item in items)
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    _use_attention(model, "sdpa")
    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
            max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0,
        )  # fmt: skip
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def run_continuous(model: Any, items: list[WorkItem]) -> float:
    """All requests handed to a fresh manager at once; its prefix sharing is left on, as the engine's is.

    Raises RuntimeError if the manager stops early or a request does not get its tokens.
    """
    from transformers import GenerationConfig

    _use_attention(model, "sdpa")
    longest_output = max(item.max_tokens for item in items)
    config = GenerationConfig(do_sample=False, max_new_tokens=longest_output, eos_token_id=-1, pad_token_id=0)
    sizes = _hints(items) if model.device.type == "cuda" else _cache_size(items)
    with model.continuous_batching_context_manager(generation_config=config, **sizes) as manager:
        started = time.perf_counter()
        for item in items:
            manager.add_request(item.prompt_token_ids, max_new_tokens=item.max_tokens, eos_token_id=-1)
        done = produced = 0
        while done < len(items):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped before all requests were done")
            elif result.is_finished():
                done += 1
                produced += len(result.generated_tokens)
        seconds = time.perf_counter() - started
    expected = sum(item.max_tokens for item in items)
    if produced != expected:
        raise RuntimeError(f"transformers' continuous batching produced {produced} tokens, {expected} expected")
    return seconds


def _hints(items: list[WorkItem]) -> dict[str, Any]:
    """What the manager may know of the workload when it sizes its cache, as `generate_batch` tells it."""
    from transformers.generation.continuous_batching import continuous_api

    hints = getattr(continuous_api, "WorkloadHints", None)
    if hints is None:
        return {}
    return {
        "workload_hints": hints(
            max_prompt_length=max(len(item.prompt_token_ids) for item in items),
            max_generated_length=max(item.max_tokens for item in items),
            num_requests=len(items),
        )
    }


def _cache_size(items: list[WorkItem]) -> dict[str, Any]:
    """On a CPU: room for the whole workload. Left alone, the manager takes nine tenths of the memory and fills it."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    blocks = sum(-(-(len(item.prompt_token_ids) + item.max_tokens) // _CPU_PAGE) for item in items)
    config = ContinuousBatchingConfig(page_size=_CPU_PAGE, num_blocks=blocks + 1, max_batch_tokens=2048)
    return {"continuous_batching_config": config}


def _use_attention(model: Any, name: str) -> None:
    """The continuous manager changes the attention function and leaves it changed."""
    model.set_attn_implementation(name)
