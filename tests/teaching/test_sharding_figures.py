"""The pictures of lesson 04, and the mistakes that its suspects have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.parallel.layout import ParallelLayout
from course_lib.teaching.explorers.figures import MAX_BYTES, png_bytes
from course_lib.teaching.explorers.sharded_mlp import (
    STEPS,
    A,
    B,
    X,
    describe_sharded_mlp,
    draw_sharded_mlp,
    share,
)
from course_lib.teaching.explorers.sharding import draw_groups, draw_heads, draw_layer
from course_lib.teaching.recording.spoiled import residuals, spoiled


def test_the_worked_example_adds_up() -> None:
    assert torch.equal(sum(share(rank)[4] for rank in range(3)), B @ (A @ X).relu())
    assert describe_sharded_mlp().endswith("The sum [8, 2] is on every rank.")
    assert "term" not in describe_sharded_mlp(2)


def test_figures_are_small() -> None:
    figures = [draw_sharded_mlp(step) for step in (None, *range(len(STEPS)))]
    figures += [draw_layer(), draw_heads(9, 3, (3, 9)), draw_groups(ParallelLayout(2, 2, 2))]
    assert all(len(png_bytes(figure)) <= MAX_BYTES for figure in figures)


def test_residuals_are_seen_in_order_and_suspects_are_known(tiny_model_path: Path) -> None:
    llm = LLM(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, num_gpu_blocks_override=64)
    model = llm.llm_engine.core.executor.runner.model
    with residuals(model) as seen:
        llm.generate({"prompt_token_ids": [3, 4, 5]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    assert len(seen) == 2 * len(model.model.layers)
    assert all(one.shape == (3, model.model.layers[0].self_attn.o_proj.weight.shape[0]) for one in seen)
    with pytest.raises(ValueError, match="suspect='D'"), spoiled(model, "D"):
        pass
