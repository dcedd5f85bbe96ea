"""Two matrix products cut for three ranks, with numbers small enough to follow, step by step.

Invariant: every number of the picture is computed here from X, A and B.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.teaching.explorers.figures import explore
from course_lib.teaching.explorers.style import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    VERMILION,
    boxes,
    canvas,
    course_style,
    tint,
)

X = torch.tensor([1, 2])
A = torch.tensor([[1, 0], [0, 1], [1, 1], [1, -1], [2, -1], [-1, 2]])  # [6, 2]
B = torch.tensor([[1, 2, 0, 1, 3, 1], [0, 1, 1, 2, 1, -1]])  # [2, 6]
RANKS = 3
RANK_COLOURS = (ORANGE, BLUE, GREEN)

# Inches.
CELL, LANE, TOP, HEIGHT = 0.33, 0.98, 0.95, 4.05
X_AT, A_AT, H_AT, R_AT, B_AT, PART_AT, SUM_AT = 0.95, 1.8, 3.0, 3.95, 4.8, 6.1, 7.75

STEPS = (
    "what each rank holds: all of x, two rows of A, two columns of B",
    "its rows of A times x: two inner features, complete, and nobody else has them",
    "relu on its own two features",
    "its columns of B times those: a term for each of the two outputs",
    "all-reduce: the terms added up, and the sum on every rank",
)


def share(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank's rows of A, its inner features, these after relu, its columns of B, its term of the result."""
    own = slice(2 * rank, 2 * rank + 2)
    inner = A[own] @ X
    return A[own], inner, inner.relu(), B[:, own], B[:, own] @ inner.relu()


def draw_sharded_mlp(step: int | None = None) -> Figure:
    """The ranks as lanes, up to `step` of STEPS; None: all of them."""
    last = len(STEPS) - 1 if step is None else step
    total = B @ (A @ X).relu()
    with course_style():
        figure, axes = canvas(HEIGHT)
        axes.text(0.2, 0.3, f"{last}  {STEPS[last]}", size=11, weight="bold")
        for at, text, since in (
            (X_AT, "x", 0), (A_AT, "rows of A", 0), (H_AT, "A x", 1), (R_AT, "relu", 2), (B_AT, "columns of B", 0),
            (PART_AT, "its term", 3), (SUM_AT, "the sum", 4),
        ):  # fmt: skip
            axes.text(at, TOP - 0.16, text, size=8.5, color=MUTED if last >= since else LINE)
        for rank in range(RANKS):
            top, colour = TOP + rank * LANE, RANK_COLOURS[rank]
            axes.text(0.2, top + CELL, f"rank {rank}", size=9, weight="bold", va="center")
            rows, inner, positive, columns, term = share(rank)
            _matrix(axes, X_AT, top, X[:, None].tolist(), PAPER, MUTED)
            _matrix(axes, A_AT, top, rows.tolist(), tint(colour, 0.3), colour, names=[f"{2 * rank + i}" for i in range(2)])
            _matrix(axes, B_AT, top, columns.tolist(), tint(colour, 0.3), colour)
            for at, since, values in ((H_AT, 1, inner), (R_AT, 2, positive), (PART_AT, 3, term)):
                if last >= since:
                    _matrix(axes, at, top, values[:, None].tolist(), tint(colour, 0.3), colour)
            if last >= 4:
                _matrix(axes, SUM_AT, top, total[:, None].tolist(), PAPER, VERMILION)
        if last >= 4:
            _meeting(axes)
        axes.text(0.2, HEIGHT - 0.2, f"in one piece: B relu(A x) = {total.tolist()}", size=9, color=MUTED)
    return figure


def describe_sharded_mlp(step: int | None = None) -> str:
    """What the picture shows."""
    last = len(STEPS) - 1 if step is None else step
    lines = [f"Step {last} of {len(STEPS) - 1}: {STEPS[last]}."]
    for rank in range(RANKS):
        rows, inner, positive, columns, term = share(rank)
        said = [f"rows {rows.tolist()} of A and columns {columns.T.tolist()} of B"]
        said += [f"A x = {inner.tolist()}"] * (last >= 1) + [f"relu {positive.tolist()}"] * (last >= 2)
        said += [f"term {term.tolist()}"] * (last >= 3)
        lines.append(f"Rank {rank}: {'; '.join(said)}.")
    if last >= 4:
        lines.append(f"The sum {(B @ (A @ X).relu()).tolist()} is on every rank.")
    return "\n".join(lines)


def explore_sharded_mlp() -> None:
    """Display the worked example with a slider over its steps."""
    explore(draw_sharded_mlp, describe_sharded_mlp, name="step", count=len(STEPS), start=0, still=len(STEPS) - 1)


def _meeting(axes: Axes) -> None:
    """Lines from every rank's term through one bar to every rank's sum."""
    middle = (PART_AT + CELL + SUM_AT) / 2
    for rank in range(RANKS):
        y = TOP + rank * LANE + CELL
        axes.plot([PART_AT + CELL + 0.06, SUM_AT - 0.06], [y, y], color=VERMILION, linewidth=1.4)
    ends = TOP + CELL - 0.25, TOP + (RANKS - 1) * LANE + CELL + 0.25
    axes.plot([middle, middle], ends, color=VERMILION, linewidth=5, solid_capstyle="round")
    axes.text(middle, ends[1] + 0.22, "all-reduce", size=8.5, color=VERMILION, ha="center")


def _matrix(
    axes: Axes, x: float, y: float, rows: list[list[int]], face: object, edge: str, names: Sequence[str] = ()
) -> None:
    cells = [(x + j * CELL, y + i * CELL, CELL, CELL) for i, row in enumerate(rows) for j in range(len(row))]
    boxes(axes, cells, facecolor=face, edgecolor=edge, linewidth=1)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            axes.text(x + (j + 0.5) * CELL, y + (i + 0.52) * CELL, f"{value}".replace("-", "−"), size=9, color=INK,
                      ha="center", va="center")  # fmt: skip
        if names:
            axes.text(x - 0.06, y + (i + 0.52) * CELL, names[i], size=7, color=MUTED, ha="right", va="center")
