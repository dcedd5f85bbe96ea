"""Who holds a seat of the batch, and whether anybody wants what is computed there.

A batch has `max_num_seqs` seats. A request holds one from the step that admits it until it is let go.
In a static batch that is later than the step of its last wanted token, and the rest is waste.

Invariant: everything here is a function of a recorded trace and of how long the answers were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from course_lib.teaching.explorers.style import (
    LINE,
    MUTED,
    PAPER,
    WIDTH,
    Mark,
    boxes,
    canvas,
    course_style,
    legend,
    marks,
    tint,
)
from course_lib.teaching.recording.trace_data import Trace

# Inches.
LEFT, RIGHT, TOP, BOTTOM, LANE = 0.75, WIDTH - 0.25, 0.85, 0.85, 0.27
WIDE_ENOUGH = 0.02  # share of the axis that a letter needs
WASTED = {"facecolor": PAPER, "edgecolor": LINE, "hatch": "////", "linewidth": 0}


@dataclass(frozen=True, slots=True)
class Sitting:
    """One request's stay: steps `first` to `end` (not included); from `wanted_end` on for nothing."""

    name: str
    seat: int
    first: int
    wanted_end: int
    end: int


def sittings(trace: Trace, answer_lengths: Sequence[int]) -> list[Sitting]:
    """The stays of a run in which nobody was preempted.

    answer_lengths: of each request of the trace, in their order, the output tokens that were wanted.
    """
    made: list[Sitting] = []
    taken_until: list[int] = []
    for name, wanted in zip(trace.requests, answer_lengths, strict=True):
        steps = [step for step in trace.steps if name in step.block_tables]
        with_token = [step.index for step in steps if step.sampled.get(name)]
        first, end = steps[0].index, steps[-1].index + 1
        free = [seat for seat, until in enumerate(taken_until) if until <= first]
        seat = free[0] if free else len(taken_until)
        taken_until[seat : seat + 1] = [end]
        made.append(Sitting(name, seat, first, with_token[wanted - 1] + 1, end))
    return made


def seat_use(trace: Trace, answer_lengths: Sequence[int]) -> float:
    """The share, 0 to 1, of seats x steps in which a request computed something that was wanted."""
    used = sum(one.wanted_end - one.first for one in sittings(trace, answer_lengths))
    return used / (trace.max_num_seqs * len(trace.steps))


def _use_of_seats(trace: Trace, answer_lengths: Sequence[int]) -> str:
    share = f"{100 * seat_use(trace, answer_lengths):.0f} % of seats x steps"
    if all(one.wanted_end == one.end for one in sittings(trace, answer_lengths)):
        return f"{share} were taken, none of them for nothing"
    return f"{share} computed something that was wanted"


def draw_seats(trace: Trace, answer_lengths: Sequence[int], num_steps: int | None = None) -> Figure:
    """Seats from top to bottom, steps from left to right; `num_steps`: how many the axis has room for.

    answer_lengths: as for `sittings`.
    """
    look = marks(trace.requests)
    height = TOP + trace.max_num_seqs * LANE + BOTTOM
    with course_style():
        figure, page = canvas(height)
        page.text(0.25, 0.38, f"{trace.max_num_seqs} seats, {len(look)} requests, {len(trace.steps)} steps",
                  size=12, weight="bold")  # fmt: skip
        page.text(0.25, 0.62, _use_of_seats(trace, answer_lengths))
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, (RIGHT - LEFT) / WIDTH,
                                trace.max_num_seqs * LANE / height))  # fmt: skip
        axes.set(
            xlim=(0, num_steps or len(trace.steps)),
            ylim=(trace.max_num_seqs, 0),
            xlabel="step",
            ylabel="seat",
        )
        axes.set_yticks([0.5, trace.max_num_seqs - 0.5], ["1", str(trace.max_num_seqs)])
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        _draw_sittings(axes, sittings(trace, answer_lengths), look)
        legend(page, LEFT, height - 0.2, {
            "the request's answer": {"facecolor": tint(MUTED, 0.5), "edgecolor": MUTED},
            "the seat is held, the answer has ended": WASTED,
        })  # fmt: skip
    return figure


def _draw_sittings(axes: Axes, stays: list[Sitting], look: dict[str, Mark]) -> None:
    boxes(axes, [(one.wanted_end, one.seat + 0.1, one.end - one.wanted_end, 0.8) for one in stays], **WASTED)
    for one in stays:
        mark, width = look[one.name], one.wanted_end - one.first
        boxes(axes, [(one.first, one.seat + 0.1, width, 0.8)], facecolor=tint(mark.colour, 0.45),
              edgecolor=mark.colour, linewidth=1)  # fmt: skip
        if width > WIDE_ENOUGH * axes.get_xlim()[1]:
            axes.text(one.first + width / 2, one.seat + 0.52, mark.letter, size=8, weight="bold", ha="center",
                      va="center_baseline")  # fmt: skip
