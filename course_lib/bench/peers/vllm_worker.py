"""vLLM's CPU build (Linux alone has one), as one side of a comparison.

Its own defaults, save threads and the size of the cache.
"""

from __future__ import annotations

import os
from typing import Any

from course_lib.bench.peers.worker import Serve, work


def load(options: dict[str, Any]) -> Serve:
    cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))  # by itself it leaves a core free
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(-(-options["kv_cache_bytes"] // 2**30)))  # GiB
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(options["model"], dtype=options["dtype"], max_model_len=options["max_model_len"])

    def serve(items: list[tuple[list[int], int]]) -> int:
        llm.reset_prefix_cache()
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in items]
        prompts = [{"prompt_token_ids": ids} for ids, _ in items]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return serve


if __name__ == "__main__":
    work(load)
