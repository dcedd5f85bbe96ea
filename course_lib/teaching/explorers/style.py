"""One look for every figure of the course.

Owns sizes, colours and type. Invariants: no fact is told by colour alone; every figure has an opaque light
background, so it reads the same on a light page and on a dark one.

Colours: Okabe and Ito, "Color Universal Design" (2008), without black.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

WIDTH = 9.0  # inches; at DPI that is a notebook's column
DPI = 105
PAPER = "#fcfcfa"
INK = "#1a1a1a"
MUTED = "#5c6066"  # 6:1 on PAPER
LINE = "#c9ccd1"

ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
SERIES = (ORANGE, SKY, GREEN, PURPLE, BLUE, VERMILION, YELLOW)

PLAIN = {"facecolor": PAPER, "linewidth": 0, "pad": 0.8}  # bbox of a text that would cross lines
# Look for `boxes` of the time that a request spends without its blocks.
PREEMPTED = {"hatch": "xxxxx", "facecolor": PAPER, "edgecolor": VERMILION, "linewidth": 0.8}

COURSE_STYLE = {
    "figure.figsize": (WIDTH, 3.6),
    "figure.dpi": DPI,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,  # inches
    "figure.constrained_layout.w_pad": 0.1,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "font.size": 9,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.8,
    "savefig.facecolor": "auto",
    "savefig.dpi": "figure",
}


@contextmanager
def course_style() -> Iterator[None]:
    """Make figures inside the block look like the course's."""
    with matplotlib.rc_context(COURSE_STYLE):
        yield


def canvas(height: float) -> tuple[Figure, Axes]:
    """A figure of `height` inches with one axes over all of it: x to the right, y down, both in inches."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PAPER, layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    return figure, axes


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """`colour` mixed into PAPER: 1 is the colour, 0 the paper."""
    pairs = zip(to_rgb(colour), to_rgb(PAPER), strict=True)
    return tuple(strength * part + (1 - strength) * paper for part, paper in pairs)


def prefill_look(num_lanes: int) -> dict[str, Any]:
    """Look of prefill, beside its colour: hatched where lanes are wide enough for it."""
    return {"hatch": "//////", "edgecolor": PAPER, "linewidth": 0.5} if num_lanes <= 30 else {}


@dataclass(frozen=True, slots=True)
class Mark:
    """How one request is told from the others in every figure of a trace."""

    letter: str  # A, B, … Z, AA, AB, …
    colour: str


def marks(names: Iterable[str]) -> dict[str, Mark]:
    """A mark for each request, by its place in `names`. Colours come round again, letters do not."""
    return {name: Mark(_letter(i), SERIES[i % len(SERIES)]) for i, name in enumerate(names)}


def _letter(index: int) -> str:
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters


def plural(number: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten(name: str, most: int = 16) -> str:
    """`name`, cut to `most` characters in its middle: long names mostly differ at their ends."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def boxes(axes: Axes, rectangles: Sequence[tuple[float, float, float, float]], **look: Any) -> None:
    """Draw many rectangles (x, y, width, height) of one kind at once; `look` goes to the collection."""
    corners = [((x, y), (x + w, y), (x + w, y + h), (x, y + h)) for x, y, w, h in rectangles]
    axes.add_collection(PolyCollection(corners, **look), autolim=False)


def chip(axes: Axes, x: float, y: float, mark: Mark) -> None:
    """A request's letter on its colour, on a `canvas`: 0.26 by 0.18 inch, upper left corner at (x, y)."""
    boxes(axes, [(x, y, 0.26, 0.18)], facecolor=tint(mark.colour, 0.3), edgecolor=mark.colour, linewidth=1)
    axes.text(x + 0.13, y + 0.095, mark.letter, size=8.5, weight="bold", ha="center", va="center")


def name_lanes(axes: Axes, left: float, right: float, top: float, lane: float, look: dict[str, Mark]) -> None:
    """Names, on a `canvas`, of lanes of `lane` inches from `top` down; of narrow lanes only some letters."""
    axes.text(left, top - 0.08, "requests", size=8.5, color=MUTED)
    names = list(look)
    for row in range(0, len(names), math.ceil(0.13 / lane)):
        name, middle = names[row], top + (row + 0.5) * lane
        if lane > 0.2:
            chip(axes, left, middle - 0.09, look[name])
            axes.text(left + 0.33, middle, shorten(name, 12), size=8.5, va="center_baseline")
        else:
            axes.text(right, middle, look[name].letter, size=7, ha="right", va="center_baseline")


def legend(axes: Axes, x: float, y: float, entries: dict[str, dict[str, Any]]) -> None:
    """One line of labelled swatches on a `canvas`, from (x, y) on; `entries`: label -> look for `boxes`."""
    for label, look in entries.items():
        boxes(axes, [(x, y - 0.07, 0.24, 0.14)], **look)
        axes.text(x + 0.3, y, label, size=8.5, va="center")
        x += 0.5 + _text_width(label)


@cache
def _text_width(text: str) -> float:
    """Inches, at a legend's size."""
    return TextPath((0, 0), text, size=8.5).get_extents().width / 72
