"""transformers, as one side of a comparison: `generate`, one left-padded batch that runs until its longest answer."""

from __future__ import annotations

from typing import Any

from course_lib.bench.peers.worker import Serve, work


def load(options: dict[str, Any]) -> Serve:
    import torch
    from transformers import AutoModelForCausalLM

    from course_lib.bench.transformers_side import run_static
    from course_lib.bench.workloads import WorkItem

    torch.set_num_threads(options["threads"])
    dtype = getattr(torch, options["dtype"])
    model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).eval()

    def serve(items: list[tuple[list[int], int]]) -> int:
        run_static(model, [WorkItem(ids, count) for ids, count in items])
        return sum(count for _, count in items)  # what was asked for; the padding produced more

    return serve


if __name__ == "__main__":
    work(load)
