"""The next token's distribution, under temperature, top-k and top-p.

Pure functions of one row of logits and three settings; the rules themselves are the engine's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure

from course_lib.sampling.topk_topp import apply_top_k_top_p
from course_lib.teaching.explorers.figures import explore_controls
from course_lib.teaching.explorers.style import BLUE, LINE, MUTED, WIDTH, course_style

NUM_BARS = 18


@dataclass(frozen=True)
class Truncated:
    """A distribution before and after truncation: the likeliest tokens, in order."""

    texts: list[str]
    full: list[float]  # probability after the temperature
    kept: list[float]  # probability after truncation, 0 where dropped
    num_kept: int
    vocab: int


def truncate(logits: torch.Tensor, tokenizer: Any, temperature: float, top_k: int, top_p: float) -> Truncated:
    """logits [V]; top_k 0 and top_p 1 are off."""
    scaled = logits.float()[None] / temperature
    full = scaled.softmax(dim=-1)[0]
    limited = apply_top_k_top_p(scaled.clone(), torch.tensor([top_k]), torch.tensor([top_p]))
    kept = limited.softmax(dim=-1)[0]
    top = full.topk(NUM_BARS).indices
    return Truncated(
        [repr(tokenizer.decode([i])) for i in top.tolist()],
        full[top].tolist(),
        kept[top].tolist(),
        int(limited.isfinite().sum()),
        len(logits),
    )


def draw_next_token(shape: Truncated) -> Figure:
    """Bars: what each token's probability was (outline) and is (filled)."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.2))
        axes = figure.add_subplot()
        places = range(len(shape.texts))
        axes.bar(places, shape.kept, color=BLUE, width=0.75, label="can be drawn")
        axes.bar(places, shape.full, color="none", edgecolor=MUTED, hatch="///", width=0.75, linewidth=0.8,
                 label="before top-k and top-p")  # fmt: skip
        axes.set_xticks(places, shape.texts, rotation=40, ha="right")
        axes.set(ylabel="probability", xlim=(-0.6, len(shape.texts) - 0.4))
        axes.grid(axis="y", color=LINE)
        axes.legend(loc="upper right")
        figure.set_layout_engine("constrained")
    return figure


def describe_next_token(shape: Truncated) -> str:
    tokens = f"{shape.num_kept:,} of {shape.vocab:,} tokens can be drawn"
    before = f"(before truncation {shape.full[0]:.2f})"
    best = f"the likeliest, {shape.texts[0]}, with probability {shape.kept[0]:.2f} {before}"
    return f"{tokens if shape.num_kept > 1 else f'Only 1 of {shape.vocab:,} tokens can be drawn'}; {best}."


def explore_next_token(
    logits: torch.Tensor, tokenizer: Any, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> None:
    """Display the distribution of `logits` [V] with sliders for the three settings."""
    import ipywidgets as widgets

    wide = {"style": {"description_width": "8em"}, "layout": widgets.Layout(width="60%")}
    controls = {
        "temperature": widgets.FloatSlider(temperature, min=0.1, max=2.0, step=0.1, description="temperature", **wide),
        "top_k": widgets.IntSlider(top_k, min=0, max=40, description="top-k (0: off)", **wide),
        "top_p": widgets.FloatSlider(top_p, min=0.05, max=1.0, step=0.05, description="top-p (1: off)", **wide),
    }
    explore_controls(
        lambda **settings: draw_next_token(truncate(logits, tokenizer, **settings)),
        lambda **settings: describe_next_token(truncate(logits, tokenizer, **settings)),
        controls,
        widgets.VBox([*controls.values()]),
    )
