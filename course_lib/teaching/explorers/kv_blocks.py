"""The KV cache at one step: the pool as a grid of blocks, beside the block tables that point into it.

The pool is shown as the scheduler left it for the step: who holds each block, which slots were filled before
and which this step fills, which blocks are free, and which of those still hold a prefix for reuse.

Invariant: `draw_blocks` and `describe_blocks` depend on nothing but their arguments, and the figure has the
same size at every step of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.teaching.explorers.block_grid import LEFT, TOP, Grid, draw_grid, draw_legend
from course_lib.teaching.explorers.figures import explore
from course_lib.teaching.explorers.style import (
    MUTED,
    WIDTH,
    Mark,
    boxes,
    canvas,
    chip,
    course_style,
    marks,
    plural,
    shorten,
)  # fmt: skip
from course_lib.teaching.recording.trace_data import Step, Trace

# Inches. The block tables lie between PANEL and RIGHT.
PANEL, RIGHT, TABLE_HEIGHT, QUEUES_HEIGHT, MOST_TABLES = 6.0, WIDTH - 0.25, 0.52, 0.5, 8


def explore_blocks(trace: Trace, step: int | None = None) -> None:
    """Display the KV cache with a slider over the steps.

    Args:
        trace: what `record` gave.
        step: where to start, from 0; None: the first step with the fewest free blocks.

    Raises:
        ValueError: the trace is empty, or has no such step.
    """
    start = _find(trace, step).index
    explore(
        lambda index: draw_blocks(trace, index), lambda index: describe_blocks(trace, index),
        name="step", count=len(trace.steps), start=start, still=start,
    )  # fmt: skip


def draw_blocks(trace: Trace, step: int | None = None) -> Figure:
    """The pool and the block tables at `step`. Takes and raises what `explore_blocks` does."""
    now = _find(trace, step)
    look = marks(trace.requests)
    grid = Grid.of(trace.num_blocks)
    tables = min(MOST_TABLES, max(len(one.block_tables) for one in trace.steps))
    bottom = max(grid.bottom, TOP + tables * TABLE_HEIGHT + QUEUES_HEIGHT)
    with course_style():
        figure, axes = canvas(bottom + 0.5)
        axes.text(LEFT, 0.38, _title(trace, now), size=12, weight="bold")
        axes.text(LEFT, 0.62, _facts(trace, now))
        draw_grid(axes, grid, trace, now, look)
        _draw_tables(axes, now, look)
        _draw_queue(axes, bottom - 0.28, "waiting", now.waiting, look)
        _draw_queue(axes, bottom - 0.04, "preempted just now", now.preempted, look)
        draw_legend(axes, bottom + 0.25, grid)
    return figure


def describe_blocks(trace: Trace, step: int | None = None) -> str:
    """What `draw_blocks` shows, in words. Takes and raises the same."""
    now = _find(trace, step)
    look = marks(trace.requests)
    lines = [f"{_title(trace, now)}: {_facts(trace, now)}."]
    for name, table in list(now.block_tables.items())[:MOST_TABLES]:
        lines.append(
            f"{look[name].letter} (request {name}): {now.computed[name]} tokens computed, "
            f"{now.scheduled.get(name, 0)} in this step; block table {_list(table, 12)}."
        )
    if len(now.block_tables) > MOST_TABLES:
        lines.append(f"and {plural(len(now.block_tables) - MOST_TABLES, 'more running request')}.")
    for what, names in (("Waiting", now.waiting), ("Preempted in this step", now.preempted)):
        if names:
            lines.append(f"{what}: {_list([look[name].letter for name in names], 12)}.")
    return "\n".join(lines)


def _find(trace: Trace, step: int | None) -> Step:
    if step is None and trace.steps:
        return min(trace.steps, key=lambda one: one.num_free)
    return trace.step(step or 0)


def _title(trace: Trace, now: Step) -> str:
    return f"KV cache at step {now.index} of {len(trace.steps) - 1}"


def _facts(trace: Trace, now: Step) -> str:
    free = f"{now.num_free} free"
    if now.cached_free:
        free += f" ({len(now.cached_free)} of them cached)"
    used = trace.num_blocks - now.num_free
    return " · ".join((
        f"{used} of {trace.num_blocks} blocks in use, {free}", f"{trace.block_size} slots a block",
        f"{len(now.block_tables)} running", f"{len(now.waiting)} waiting", f"{len(now.preempted)} preempted",
    ))  # fmt: skip


def _list(items: Sequence[object], most: int) -> str:
    shown = items if len(items) <= most else [*items[: most - 2], "…", items[-1]]
    return " ".join(map(str, shown))


def _draw_tables(axes: Axes, now: Step, look: dict[str, Mark]) -> None:
    axes.text(PANEL, TOP - 0.12, "block tables", size=8.5, color=MUTED)
    axes.text(RIGHT, TOP - 0.12, "tokens: computed + this step", size=8.5, color=MUTED, ha="right")
    digits = len(str(max((block for table in now.block_tables.values() for block in table), default=0)))
    width = 0.14 + 0.08 * digits
    most = int((RIGHT - PANEL) / width)
    for row, (name, table) in enumerate(list(now.block_tables.items())[:MOST_TABLES]):
        y = TOP + row * TABLE_HEIGHT
        chip(axes, PANEL, y, look[name])
        axes.text(PANEL + 0.34, y + 0.14, f"request {shorten(name)}", size=8.5)
        tokens = f"{now.computed[name]} + {now.scheduled.get(name, 0)}"
        axes.text(RIGHT, y + 0.14, tokens, size=8.5, ha="right")
        shown = table if len(table) <= most else (*table[: most - 2], "…", table[-1])
        cells = [(PANEL + i * width, y + 0.22, width, 0.18) for i in range(len(shown))]
        boxes(axes, cells, facecolor="none", edgecolor=MUTED, linewidth=0.7)
        for (x, top, _, height), block in zip(cells, shown, strict=True):
            axes.text(x + width / 2, top + height / 2 + 0.005, block, size=7.5, ha="center", va="center")


def _draw_queue(axes: Axes, y: float, what: str, names: Sequence[str], look: dict[str, Mark]) -> None:
    axes.text(PANEL, y, what, size=8.5, color=MUTED)
    letters = _list([look[name].letter for name in names], 8) or "none"
    axes.text(PANEL + 1.5, y, letters, size=8.5, weight="bold" if names else "normal")
