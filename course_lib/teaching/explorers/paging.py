"""Pictures and measurements of paging: block tables, slots held and filled, what a block's size costs.

Invariant: a `draw_*` depends on nothing but its arguments.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from course_lib.teaching.explorers.style import (
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    SKY,
    WIDTH,
    boxes,
    canvas,
    course_style,
    tint,
)  # fmt: skip
from course_lib.teaching.recording.trace_data import Trace

# Inches.
LEFT, CELL, TOKENS_Y, TABLE_Y, CACHE_Y, HEIGHT = 1.45, 0.56, 0.42, 1.45, 2.3, 3.05
BLOCK_COLOURS = (SKY, ORANGE, GREEN)


def draw_table(tokens: Sequence[str], table: Sequence[int], block_size: int, num_blocks: int) -> Figure:
    """A request's tokens by position, its block table, and its blocks among all those of the cache.

    tokens: at most len(table) * block_size texts; num_blocks: blocks in the cache.
    """
    with course_style():
        figure, axes = canvas(HEIGHT)
        slot = (WIDTH - 0.2 - LEFT) / (num_blocks * block_size + 0.35 * (num_blocks - 1))
        for y, what in ((TOKENS_Y, "tokens,\nby position"), (TABLE_Y, "block table"), (CACHE_Y, "the cache,\nby slot")):
            axes.text(0.2, y + 0.17, what, size=9, color=MUTED, va="center")
        for block_id in range(num_blocks):
            x = LEFT + block_id * (block_size + 0.35) * slot
            boxes(axes, [(x + i * slot, CACHE_Y, slot, 0.34) for i in range(block_size)], facecolor="none", edgecolor=LINE)
            axes.text(x, CACHE_Y + 0.48, f"block {block_id}", size=8, color=MUTED)
            for i in range(block_size):
                axes.text(x + (i + 0.5) * slot, CACHE_Y + 0.18, block_id * block_size + i, size=7, color=MUTED, ha="center",
                          va="center", zorder=3)  # fmt: skip
        for index, block_id in enumerate(table):
            colour = BLOCK_COLOURS[index % len(BLOCK_COLOURS)]
            left = LEFT + index * (block_size + 0.4) * CELL
            entry = left + (block_size / 2 - 0.5) * CELL
            target = LEFT + block_id * (block_size + 0.35) * slot
            here = tokens[index * block_size : (index + 1) * block_size]
            places = [left + i * CELL for i in range(block_size)]
            boxes(axes, [(x, TOKENS_Y, CELL, 0.34) for x in places], facecolor="none", edgecolor=MUTED, linestyle=":")
            boxes(axes, [(x, TOKENS_Y, CELL, 0.34) for x in places[: len(here)]], facecolor=tint(colour, 0.35), edgecolor=INK)
            boxes(axes, [(target + i * slot, CACHE_Y, slot, 0.34) for i in range(len(here))],
                  facecolor=tint(colour, 0.35), edgecolor=INK)  # fmt: skip
            boxes(axes, [(entry, TABLE_Y, CELL, 0.34)], facecolor=tint(colour, 0.35), edgecolor=INK)
            axes.text(entry + CELL / 2, TABLE_Y + 0.18, block_id, size=11, weight="bold", ha="center", va="center")
            for i, text in enumerate(here):
                axes.text(places[i] + CELL / 2, TOKENS_Y + 0.18, text.strip(), size=8.5, ha="center", va="center")
            for i, x in enumerate(places):
                axes.text(x + CELL / 2, TOKENS_Y + 0.47, index * block_size + i, size=7.5, color=MUTED, ha="center")
            middle = entry + CELL / 2
            arrow = {"arrowstyle": "->", "color": MUTED}
            axes.annotate("", (middle, TABLE_Y), (middle, TOKENS_Y + 0.55), arrowprops=arrow)
            end = (target + block_size * slot / 2, CACHE_Y)
            axes.annotate("", end, (middle, TABLE_Y + 0.34), arrowprops=arrow)
    return figure


def slots_in_use(trace: Trace) -> list[tuple[int, int]]:
    """For each step: cache slots that requests hold, and how many of those are filled when it ends."""
    found, size = [], trace.block_size
    for step in trace.steps:
        filled: dict[int, int] = {}  # by block: requests that share one fill it once
        for name, table in step.block_tables.items():
            tokens = step.computed[name] + step.scheduled.get(name, 0)
            for place, block_id in enumerate(table):
                here = min(size, max(0, tokens - place * size))
                filled[block_id] = max(filled.get(block_id, 0), here)
        found.append((len(filled) * size, sum(filled.values())))
    return found


def share_filled(trace: Trace) -> float:
    """Of the slots that were held, the share that was filled, over all steps."""
    held, filled = map(sum, zip(*slots_in_use(trace), strict=True))
    return filled / held


def draw_slots(traces: Mapping[str, Trace]) -> Figure:
    """Slots held and filled, step by step; one panel per trace, on the same scales."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        panels = figure.subplots(1, len(traces), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (name, trace) in zip(panels, traces.items(), strict=True):
            held, filled = zip(*slots_in_use(trace), strict=True)
            steps = range(len(trace.steps))
            axes.fill_between(steps, held, step="mid", facecolor=tint(ORANGE, 0.45), hatch="////", edgecolor=PAPER,
                              label="held by requests")  # fmt: skip
            axes.fill_between(steps, filled, step="mid", color=SKY, label="filled with keys and values")
            axes.axhline(trace.block_size * trace.num_blocks, color=INK, linestyle="--", linewidth=1, label="the whole cache")
            axes.set(title=f"{name}: {share_filled(trace):.0%} of what is held is filled", xlabel="step", ylim=(0, None))
        panels[0].set_ylabel("slots")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def start_over(llm: Any) -> None:
    """Make an `LLM`'s engine like new: no requests, no cached prefixes, a new pool, zeros in every slot."""
    engine = llm.llm_engine
    engine.core.reset()
    engine.frontend.forget_all()
    for layer in engine.core.executor.runner.model.attention_layers():
        for half in layer.kv_cache:  # keys and values
            half.zero_()


def empty_share(trace: Trace, block_size: int) -> float:
    """Of the slots held in `trace`, the share that would have been empty in blocks of another size, 0 to 1."""
    tokens = [step.computed[name] + step.scheduled.get(name, 0) for step in trace.steps for name in step.block_tables]
    return 1 - sum(tokens) / sum(-(-n // block_size) * block_size for n in tokens)


def gather_rate(block_size: int) -> float:
    """GB per second at which one core collects the keys of eight requests of 1,024 tokens (3 heads of size 64,
    float32) from random blocks of a cache of 100 MB: the best of 25 times. One head of one block is one piece, as
    the torch backend stores it."""
    pieces = torch.ones(2**17 * 3 // block_size, block_size * 64)
    chosen = torch.randperm(len(pieces))[: 8 * 1024 * 3 // block_size]
    collected = torch.empty(len(chosen), block_size * 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are at the mercy of whatever else runs
    best = float("inf")
    for _ in range(25):
        start = time.perf_counter()
        torch.index_select(pieces, 0, chosen, out=collected)
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return collected.nbytes / best / 1e9


def draw_block_sizes(sizes: Sequence[int], empty: Sequence[float], rates: Sequence[float]) -> Figure:
    """Two panels over the block size: the empty share of held slots, and the rate of collecting keys in GB/s."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(sizes, [100 * share for share in empty], marker="o")
        right.plot(sizes, rates, marker="s")
        for axes, what in ((left, "% of held slots empty"), (right, "GB/s collected")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, sizes)
            axes.set(xlabel="block size, tokens", ylabel=what, ylim=(0, None))
            axes.axvline(16, linestyle=":", color=MUTED)
    return figure


def draw_wrong(rows: Mapping[str, Sequence[bool]]) -> Figure:
    """One row of positions for each suspect, coloured where something is wrong."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 0.5 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(list(rows.values()), cmap="Oranges", vmin=0, vmax=1.5, aspect="auto")
        axes.set_yticks(range(len(rows)), list(rows))
        length = len(next(iter(rows.values())))
        axes.set(xlabel="position in the request (coloured: its key in the cache is wrong)", xticks=range(0, length, 8))
    return figure
