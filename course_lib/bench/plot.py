"""Ledgers as one picture: a panel per group of rows, bars with the range over the repeats.

The background is opaque, so the picture can be read on light and dark pages. A group whose rows are named by numbers
(such as 64, 256, 1024 running requests) becomes a curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.bench.ledger import Ledger, Row, number, share
from course_lib.errors import CourseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#4269d0", "#e8833a", "#3ca951", "#a463f2", "#9c6b4e")
_INK, _FAINT, _PAPER = "#1b1e23", "#c9ced6", "#ffffff"
_DPI = 100
_PNG_COLORS = 48
_PANEL_WIDTH, _BAR_HEIGHT = 7.2, 0.26  # inches


def plot_ledgers(ledgers: Sequence[tuple[str, Ledger]], path: Path) -> None:
    """Write the picture (.png or .svg). `ledgers`: (label, ledger). Raises CourseError without matplotlib or rows."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CourseError("bench plot needs matplotlib: run it in the course's environment, which has it") from error

    panels = _panels(ledgers)
    if not panels:
        raise CourseError("bench plot: there are no rows in these ledgers; measure something first")
    heights = [1.0 + _BAR_HEIGHT * (9 if _is_curve(rows) else _bars(rows)) for rows in panels.values()]
    figure = Figure(figsize=(_PANEL_WIDTH, sum(heights)), facecolor=_PAPER, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    labels = [label for label, _ in ledgers]
    for axis, ((group, unit), rows) in zip(axes, panels.items(), strict=True):
        (_draw_curve if _is_curve(rows) else _draw_bars)(axis, rows, labels)
        axis.set_title(_title(group, unit, rows), loc="left", fontsize=9, color=_INK, weight="bold")
        axis.tick_params(labelsize=8, colors=_INK, length=0)
        axis.set_facecolor(_PAPER)
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
        axis.spines["left"].set_color(_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        figure.savefig(path, facecolor=_PAPER, metadata={"Date": None})
        return
    figure.savefig(path, dpi=_DPI, facecolor=_PAPER)
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").quantize(_PNG_COLORS).save(path, optimize=True)  # a third of the size


Panel = list[tuple[str, list[Row | None]]]  # row name -> that row of each ledger


def _panels(ledgers: Sequence[tuple[str, Ledger]]) -> dict[tuple[str, str], Panel]:
    """By (group, unit), in the order of first appearance; ceilings are drawn nowhere."""
    panels: dict[tuple[str, str], dict[str, list[Row | None]]] = {}
    for index, (_, ledger) in enumerate(ledgers):
        for row in ledger.rows:
            if row.group != "ceiling":
                names = panels.setdefault((row.group, row.unit), {})
                names.setdefault(row.name, [None] * len(ledgers))[index] = row
    return {key: list(names.items()) for key, names in panels.items()}


def _is_curve(panel: Panel) -> bool:
    return len(panel) > 2 and all(name.isdigit() for name, _ in panel)


def _bars(panel: Panel) -> int:
    return sum(len([row for row in rows if row is not None]) for _, rows in panel)


def _title(group: str, unit: str, panel: Panel) -> str:
    limits = [row.limit for _, rows in panel for row in rows if row is not None and row.limit]
    limit = f"; the machine's limit: {number(max(limits))}" if limits else ""
    return f"{group}, {unit}{limit}" if group else f"{unit}{limit}"


def _draw_bars(axis: Axes, panel: Panel, labels: list[str]) -> None:
    """One bar per row and ledger, the first on top, its median written at its end."""
    bars = [(name, i, row) for name, rows in panel for i, row in enumerate(rows) if row is not None]
    longest = max(row.range[1] for _, _, row in bars)
    for y, (_, i, row) in enumerate(bars):
        low, high = row.range
        axis.barh(y, row.median, height=0.72, color=_COLORS[i % len(_COLORS)])
        axis.plot([low, high], [y, y], color=_INK, linewidth=1.2)
        axis.text(high + 0.01 * longest, y, _said(row), va="center", fontsize=8, color=_INK)
    several = len(labels) > 1
    names = [f"{name} ({labels[i]})" if several and labels[i] else name for name, i, _ in bars]
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.set_xlim(0, 1.35 * longest)
    axis.set_xticks([])


def _said(row: Row) -> str:
    """The median, and what it is of: "1,171  (11%, 320 GB/s)"."""
    achieved: Any = row.details.get("achieved_gb_s")
    facts = [share(row), "" if achieved is None else f"{number(achieved)} GB/s"]
    told = ", ".join(fact for fact in facts if fact)
    return f"{number(row.median)}{f'  ({told})' if told else ''}"


def _draw_curve(axis: Axes, panel: Panel, labels: list[str]) -> None:
    """Medians over the rows' numbers, both axes logarithmic, with a line of slope one through the first point."""
    counts = [int(name) for name, _ in panel]
    for i, label in enumerate(labels):
        points = [(count, rows[i]) for count, (_, rows) in zip(counts, panel, strict=True) if rows[i] is not None]
        if not points:
            continue
        x = [count for count, _ in points]
        y = [row.median for _, row in points]
        errors = [[row.median - row.range[0] for _, row in points], [row.range[1] - row.median for _, row in points]]
        color = _COLORS[i % len(_COLORS)]
        axis.errorbar(x, y, yerr=errors, color=color, marker="o", markersize=4, label=label or None)
        axis.plot(x, [y[0] * count / x[0] for count in x], color=_FAINT, linestyle="--", zorder=0)
        for count, value in zip(x, y, strict=True):
            axis.annotate(number(value), (count, value), (4, -10), textcoords="offset points", fontsize=8, color=_INK)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(counts, map(str, counts))
    axis.minorticks_off()
    axis.set_yticks([])
    if any(labels):
        axis.legend(fontsize=8, frameon=False)
