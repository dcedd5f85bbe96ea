"""Pictures of a model on several ranks: what each holds, where they meet, who belongs to which group.

Invariant: a `draw_*` depends on nothing but its arguments; shares come from the engine's own layout functions.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.parallel.layout import ParallelLayout, split_evenly
from course_lib.teaching.explorers.style import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    VERMILION,
    WIDTH,
    boxes,
    canvas,
    course_style,
    tint,
)

RANK_COLOURS = (ORANGE, BLUE, GREEN)
# A decoder layer between its two sums: x and width in inches, what stands there, whether it is a rank's share.
LAYER = (
    (0.72, 0.7, "embedding\n16,384 rows", True), (1.82, 0.45, "norm", False), (2.36, 0.76, "q, k, v\n3 + 1 + 1\nheads", True),
    (3.2, 0.76, "attention\n3 heads", True), (4.04, 0.6, "o\n192\ncolumns", True), (5.0, 0.45, "norm", False),
    (5.54, 0.66, "gate, up\n512 + 512\nrows", True), (6.26, 0.62, "down\n512\ncolumns", True),
    (7.28, 0.45, "norm", False), (7.81, 0.68, "head\n16,384\nrows", True),
)  # fmt: skip
SUMS, GATHER = (1.62, 4.81, 7.08), 8.65
TOP, LANE, LAYER_HEIGHT = 0.95, 0.78, 3.95


def draw_layer(hidden: int = 576, vocab: int = 49152) -> Figure:
    """The course model on three ranks: embedding, one of its layers, head, and the meetings between."""
    with course_style():
        figure, axes = canvas(LAYER_HEIGHT)
        axes.text(0.2, 0.3, "One token through three ranks: shares are coloured, what is whole is white", size=11,
                  weight="bold")  # fmt: skip
        bottom = TOP + 3 * LANE
        boxes(axes, [(1.74, TOP - 0.28, 5.46, 3 * LANE + 0.42)], facecolor="none", edgecolor=MUTED, linestyle=":")
        axes.text(4.45, TOP - 0.36, "a layer: 30 times", size=8.5, color=MUTED, ha="center")
        for rank in range(3):
            top, colour = TOP + rank * LANE, RANK_COLOURS[rank]
            axes.text(0.2, top + 0.3, f"rank {rank}", size=9, weight="bold", va="center")
            axes.plot([0.67, GATHER + 0.15], [top + 0.3, top + 0.3], color=LINE, linewidth=1, zorder=0)
            for x, width, text, is_share in LAYER:
                face = tint(colour, 0.3) if is_share else PAPER
                boxes(axes, [(x, top, width, 0.6)], facecolor=face, edgecolor=colour if is_share else MUTED, linewidth=1)
                axes.text(x + width / 2, top + 0.31, text, size=7.3, ha="center", va="center", linespacing=1.15)
        for x in SUMS:
            _bar(axes, x, VERMILION)
            axes.text(x, bottom + 0.18, f"all-reduce\n{4 * hidden:,} bytes", size=8, color=VERMILION, ha="center", va="top")
        _bar(axes, GATHER, PURPLE)
        axes.text(GATHER, bottom + 0.18, f"gather\n{4 * vocab // 3:,}", size=8, color=PURPLE, ha="center", va="top")
    return figure


def _bar(axes: Axes, x: float, colour: str) -> None:
    axes.plot([x, x], [TOP - 0.08, TOP + 2 * LANE + 0.68], color=colour, linewidth=5, solid_capstyle="round")


def draw_heads(num_heads: int, num_kv_heads: int, sizes: tuple[int, ...]) -> Figure:
    """Which heads' rows of the fused projection each rank holds, for each number of ranks in `sizes`."""
    cell, row, top = 0.222, 0.22, 1.0
    with course_style():
        height = top + max(sizes) * row + 0.25
        figure, axes = canvas(height)
        axes.text(0.2, 0.3, f"{num_heads} query heads, {num_kv_heads} KV heads", size=11, weight="bold")
        for panel, ranks in enumerate(sizes):
            left = 0.75 + panel * (WIDTH - 0.2) / len(sizes)
            axes.text(left, 0.62, f"{ranks} ranks", size=9.5, weight="bold")
            starts = (left, left + (num_heads + 0.5) * cell, left + (num_heads + num_kv_heads + 1) * cell)
            counts = (num_heads, num_kv_heads, num_kv_heads)
            for start, count, name in zip(starts, counts, "qkv", strict=True):
                for head in range(count):
                    axes.text(start + (head + 0.5) * cell, top - 0.08, f"{name}{head}", size=7, color=MUTED, ha="center")
            for rank in range(ranks):
                y, colour = top + rank * row, RANK_COLOURS[rank % 3]
                axes.text(left - 0.1, y + row / 2, f"rank {rank}", size=8, ha="right", va="center")
                held = (split_evenly(num_heads, ranks)[rank], *2 * (_kv_heads(num_kv_heads, ranks, rank),))
                for start, count, own in zip(starts, counts, held, strict=True):
                    cells = [(start + head * cell, y, cell, row) for head in range(count)]
                    boxes(axes, cells, facecolor="none", edgecolor=LINE, linewidth=0.6)
                    mine = [cells[head] for head in own]
                    boxes(axes, mine, facecolor=tint(colour, 0.6), edgecolor=INK, linewidth=0.8)
    return figure


def _kv_heads(num_kv_heads: int, ranks: int, rank: int) -> range:
    copies = max(1, ranks // num_kv_heads)
    return split_evenly(num_kv_heads, ranks // copies)[rank // copies]


def draw_groups(layout: ParallelLayout) -> Figure:
    """All ranks: replicas side by side, stages from top to bottom, tensor ranks from left to right."""
    box, gap_x, gap_y, top = 0.55, 0.75, 0.85, 1.0
    with course_style():
        figure, axes = canvas(top + layout.pipeline * gap_y + 0.35)
        axes.text(0.2, 0.3, f"{layout.world_size} ranks: tensor {layout.tensor}, pipeline {layout.pipeline}, "
                  f"data {layout.data}", size=11, weight="bold")  # fmt: skip
        place = {}
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            left = 1.5 + at.data * (layout.tensor * gap_x + 1.1)
            place[rank] = left + at.tensor * gap_x, top + at.pipeline * gap_y
        for data in range(layout.data):
            axes.text(place[layout.rank(data=data)][0], top - 0.2, f"replica {data}", size=8.5, color=MUTED)
        for stage in range(layout.pipeline):
            axes.text(0.2, top + stage * gap_y + box / 2, f"stage {stage}", size=9, va="center")
        half = box / 2
        for groups, colour, width in ((layout.tensor_groups(), VERMILION, 5), (layout.pipeline_groups(), BLUE, 2)):
            for group in groups:
                xs, ys = zip(*(place[rank] for rank in group), strict=True)
                axes.plot([x + half for x in xs], [y + half for y in ys], color=colour, linewidth=width, zorder=1)
        for rank, (x, y) in place.items():
            boxes(axes, [(x, y, box, box)], facecolor=PAPER, edgecolor=INK, linewidth=1, zorder=2)
            axes.text(x + half, y + half, rank, size=11, weight="bold", ha="center", va="center", zorder=3)
        right = max(x for x, _ in place.values()) + box + 0.6
        axes.plot([right, right + 0.3], [top + 0.15] * 2, color=VERMILION, linewidth=5)
        axes.text(right + 0.4, top + 0.15, "tensor group: every layer, twice", size=8.5, va="center")
        axes.plot([right, right + 0.3], [top + 0.5] * 2, color=BLUE, linewidth=2)
        axes.text(right + 0.4, top + 0.5, "pipeline group: once per stage", size=8.5, va="center")
    return figure
