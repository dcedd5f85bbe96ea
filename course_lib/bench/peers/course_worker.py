"""This engine, as one side of a comparison."""

from __future__ import annotations

from typing import Any

from course_lib.bench.peers.worker import Serve, work


def load(options: dict[str, Any]) -> Serve:
    import torch

    from course_lib import LLM, SamplingParams

    torch.set_num_threads(options["threads"])
    llm = LLM(
        options["model"], dtype=options["dtype"], device="cpu", max_model_len=options["max_model_len"],
        kv_cache_memory_bytes=options["kv_cache_bytes"],
    )  # fmt: skip

    def serve(items: list[tuple[list[int], int]]) -> int:
        llm.reset_prefix_cache()
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in items]
        outputs = llm.generate([ids for ids, _ in items], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return serve


if __name__ == "__main__":
    work(load)
