"""The blocks of the KV cache, drawn as a grid that fits its place whatever their number.

Up to 64 blocks each show their id, their owners' letters and every slot; up to some 250 the letters and how
full they are; more are squares of their owner's colour. Free blocks are empty, or hatched if they hold a
prefix.

Invariant: the same number of blocks always makes the same grid.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from course_lib.teaching.explorers.style import INK, LINE, MUTED, PAPER, PLAIN, Mark, boxes, legend, tint
from course_lib.teaching.recording.trace_data import Step, Trace

# Inches, on a `canvas`.
LEFT, RIGHT, TOP, MOST_HEIGHT = 0.25, 5.75, 1.05, 4.7

FREE = {"facecolor": "none", "edgecolor": LINE, "linewidth": 0.8}
CACHED = {"facecolor": "none", "edgecolor": MUTED, "linewidth": 0.8, "hatch": "////"}


Look = dict[str, Mark]  # how each request is told from the others, by name


@dataclass(slots=True)
class HeldBlock:
    """A block in use: by whom, and how many of its slots are filled before and after the step."""

    before: int = sys.maxsize
    after: int = 0
    owners: list[str] = field(default_factory=list)


def held_blocks(trace: Trace, step: Step) -> dict[int, HeldBlock]:
    """The blocks in use at `step`, by id."""
    held: dict[int, HeldBlock] = {}
    for name, table in step.block_tables.items():
        before = step.computed[name]
        after = before + step.scheduled.get(name, 0)
        for place, block_id in enumerate(table):
            block = held.setdefault(block_id, HeldBlock())
            first = place * trace.block_size
            # Who shares a block that another fills in this very step counts it as filled: the least is true.
            block.before = min(block.before, max(0, min(trace.block_size, before - first)))
            block.after = max(block.after, min(trace.block_size, after - first))
            block.owners.append(name)
    return held


@dataclass(frozen=True, slots=True)
class Grid:
    """Where each block is drawn; cells shrink until all fit, and then say less. Lengths in inches."""

    columns: int
    rows: int
    left: float
    width: float  # of a cell, with the gap to the next
    height: float

    @classmethod
    def of(cls, num_blocks: int) -> Grid:
        """The grid for that many blocks."""
        for columns in itertools.chain((4,), itertools.count(8, 8)):
            left = LEFT if columns <= 8 else LEFT + 0.4  # where cells have no number, rows have one
            width = (RIGHT - left) / columns
            rows, height = -(-num_blocks // columns), min(0.85 * width, 0.7)
            if rows * height <= MOST_HEIGHT:
                return cls(columns, rows, left, width, height)

    @property
    def bottom(self) -> float:
        return TOP + self.rows * self.height

    @property
    def has_numbers(self) -> bool:
        """Whether cells have room for their block's id and the count of its slots."""
        return self.columns <= 8

    @property
    def has_letters(self) -> bool:
        return self.columns <= 16

    def cell(self, block_id: int) -> tuple[float, float, float, float]:
        """x, y, width, height of the block's box."""
        row, column = divmod(block_id, self.columns)
        gap = 0.12 * self.height
        return self.left + column * self.width, TOP + row * self.height, self.width - gap, self.height - gap


def draw_grid(axes: Axes, grid: Grid, trace: Trace, step: Step, look: Look) -> None:
    """Draw the pool at `step` on a `canvas`."""
    axes.text(LEFT, TOP - 0.12, "the blocks, by id", size=8.5, color=MUTED)
    held = held_blocks(trace, step)
    cached = [grid.cell(i) for i in step.cached_free]
    blank = {*range(trace.num_blocks)} - held.keys() - {*step.cached_free}
    boxes(axes, [grid.cell(i) for i in blank], **FREE)
    if grid.has_letters:
        boxes(axes, cached, **CACHED)
        _draw_cells(axes, grid, trace.block_size, held, look)
    else:  # a thousand hatches would take half a second to draw, smooth lines 10 KB
        boxes(axes, cached, **FREE)
        strokes = [((x, y + h), (x + w, y)) for x, y, w, h in cached]
        axes.add_collection(LineCollection(strokes, colors=MUTED, linewidths=0.8, antialiaseds=False))
        _draw_squares(axes, grid, trace.block_size, held, look)
    if grid.has_numbers:
        for block_id in range(trace.num_blocks):
            x, y, _, _ = grid.cell(block_id)
            back = PLAIN if block_id in step.cached_free else None
            axes.text(x + 0.04, y + 0.12, block_id, size=7, color=MUTED, bbox=back)
        for x, y, width, height in cached:
            axes.text(x + width / 2, y + height / 2, "cached", size=7.5, ha="center", va="center", bbox=PLAIN)
    else:
        for row in range(0, grid.rows, math.ceil(0.16 / grid.height)):
            y = TOP + (row + 0.44) * grid.height
            axes.text(grid.left - 0.08, y, row * grid.columns, size=7, color=MUTED, ha="right", va="center")


def _draw_cells(axes: Axes, grid: Grid, size: int, held: dict[int, HeldBlock], look: Look) -> None:
    """Blocks in use: the owners' letters above a strip of slots."""
    strip = 0.26 * grid.height
    faces, slots, outlines, cuts = {}, {}, {}, []  # rectangle -> colour; lines between slots
    for block_id, block in held.items():
        x, y, width, height = grid.cell(block_id)
        owners = [look[name] for name in block.owners]
        share, slot, top = width / len(owners), width / size, y + height - strip
        for i, owner in enumerate(owners):
            faces[x + i * share, y, share, height] = tint(owner.colour, 0.3)
        slots[x, top, width, strip] = PAPER
        slots[x, top, slot * block.before, strip] = owners[0].colour
        slots[x + slot * block.before, top, slot * (block.after - block.before), strip] = INK
        outlines[x, y, width, height] = INK if len(owners) > 1 else owners[0].colour
        letters = [owner.letter for owner in owners]
        if len("".join(letters)) > 3:
            letters = [f"{len(letters)}×"]
        middle = (y + top + (0.12 if grid.has_numbers else 0)) / 2
        for i, letter in enumerate(letters):
            axes.text(x + (i + 0.5) * width / len(letters), middle, letter, weight="bold", ha="center",
                      va="center_baseline", size=10.5 if grid.has_numbers else 8)  # fmt: skip
        if grid.has_numbers:
            axes.text(x + width - 0.04, y + 0.12, f"{block.after}/{size}", size=7, color=MUTED, ha="right")
            if size <= 32:
                cuts += [((x + i * slot, top), (x + i * slot, top + strip)) for i in range(1, size)]
    boxes(axes, list(faces), facecolors=list(faces.values()))
    boxes(axes, list(slots), facecolors=list(slots.values()))
    axes.add_collection(LineCollection(cuts, colors=LINE, linewidths=0.5, zorder=1))
    boxes(axes, list(outlines), facecolor="none", edgecolors=list(outlines.values()), linewidth=1.4)


def _draw_squares(axes: Axes, grid: Grid, size: int, held: dict[int, HeldBlock], look: Look) -> None:
    """Blocks in use: the first owner's colour, paler while slots are empty; a dot where this step writes."""
    cells, dots = {}, []  # rectangle -> colour
    for block_id, block in held.items():
        x, y, width, height = grid.cell(block_id)
        cells[x, y, width, height] = tint(look[block.owners[0]].colour, 1 if block.after == size else 0.5)
        if block.after > block.before:
            dots.append((x + 0.3 * width, y + 0.3 * height, 0.4 * width, 0.4 * height))
    boxes(axes, list(cells), facecolors=list(cells.values()))
    boxes(axes, dots, facecolor=INK)


def draw_legend(axes: Axes, y: float, grid: Grid) -> None:
    """Draw what the cells mean, on a `canvas`."""
    if grid.has_letters:
        used = {
            "slots filled": {"facecolor": MUTED}, "filled in this step": {"facecolor": INK},
            "shared": {"facecolor": "none", "edgecolor": INK, "linewidth": 1.4},
        }  # fmt: skip
    else:
        used = {
            "full": {"facecolor": MUTED}, "has empty slots": {"facecolor": tint(MUTED, 0.5)},
            "(a dot) filled in this step": {"facecolor": INK},
        }  # fmt: skip
    legend(axes, LEFT, y, used | {"free": FREE, "free, but cached: a prefix can still hit it": CACHED})
