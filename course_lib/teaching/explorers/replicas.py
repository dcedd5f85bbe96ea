"""Pictures of several replicas: a stream under three rules of balancing; answers that outlive a replica.

Invariant: everything drawn is a function of the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from course_lib.teaching.explorers.figures import explore_controls
from course_lib.teaching.explorers.style import (
    BLUE,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    VERMILION,
    WIDTH,
    boxes,
    canvas,
    course_style,
    legend,
    tint,
)
from course_lib.teaching.recording.balancing import RULES, STREAMS, last_end, spread

COLOURS = (ORANGE, BLUE)
SEATS = 2
# Inches.
LEFT, RIGHT, TOP, LANE, GAP, BOTTOM = 1.75, WIDTH - 1.1, 0.75, 0.2, 0.3, 0.55
IDLE = {"facecolor": PAPER, "edgecolor": LINE, "hatch": "////", "linewidth": 0}


def draw_balancing(stream: str) -> Figure:
    """One of STREAMS under each of RULES: two replicas with two seats each, steps from left to right."""
    jobs = STREAMS[stream]
    runs = {rule: spread(jobs, rule) for rule in RULES}
    longest = max(map(last_end, runs.values()))
    tall = 2 * SEATS * LANE
    height = TOP + len(RULES) * (tall + GAP) + BOTTOM
    scale = (RIGHT - LEFT) / longest
    with course_style():
        figure, page = canvas(height)
        page.text(0.25, 0.35, f"Twelve requests: {stream}", size=12, weight="bold")
        for number, (rule, stays) in enumerate(runs.items()):
            top, end = TOP + number * (tall + GAP), last_end(stays)
            page.text(0.25, top + tall / 2, rule.replace("_", " "), size=9.5, va="center", weight="bold")
            boxes(page, [(LEFT, top, end * scale, tall)], **IDLE)
            x = LEFT + end * scale
            page.plot([x, x], [top - 0.04, top + tall + 0.04], color=VERMILION, linewidth=1.6)
            page.text(LEFT + end * scale + 0.08, top + tall / 2, f"{end} steps", size=9, va="center",
                      color=VERMILION, weight="bold")  # fmt: skip
            page.plot([LEFT, LEFT + end * scale], [top + tall / 2] * 2, color=MUTED, linewidth=0.7)
            for stay in stays:
                y, colour = top + (stay.replica * SEATS + stay.seat) * LANE, COLOURS[stay.replica]
                width = (stay.end - stay.first) * scale
                boxes(page, [(LEFT + stay.first * scale, y + 0.02, width, LANE - 0.04)],
                      facecolor=tint(colour, 0.45), edgecolor=colour, linewidth=0.9)  # fmt: skip
                page.text(LEFT + stay.first * scale + width / 2, y + LANE / 2 + 0.005, str(stay.job), size=7,
                          ha="center", va="center")  # fmt: skip
        legend(page, LEFT, height - 0.22, {
            "answer in a seat of replica 0": {"facecolor": tint(ORANGE, 0.45), "edgecolor": ORANGE},
            "of replica 1": {"facecolor": tint(BLUE, 0.45), "edgecolor": BLUE},
            "empty seat": {**IDLE, "edgecolor": MUTED},
        })  # fmt: skip
    return figure


def describe_balancing(stream: str) -> str:
    """What the picture shows."""
    lines = [f"Twelve requests, {stream}, on two replicas with two seats each."]
    for rule in RULES:
        stays = spread(STREAMS[stream], rule)
        ends = " and ".join(str(last_end(stays, replica)) for replica in (0, 1))
        given = [sum(stay.end - stay.first for stay in stays if stay.replica == i) for i in (0, 1)]
        lines.append(
            f"{rule.replace('_', ' ')}: {given[0]} and {given[1]} tokens, "
            f"the replicas end after {ends} steps."
        )
    return "\n".join(lines)


def explore_balancing() -> None:
    """Display the three rules with a choice of the stream."""
    import ipywidgets as widgets

    choice = widgets.Dropdown(options=list(STREAMS), description="stream")
    explore_controls(draw_balancing, describe_balancing, {"stream": choice}, choice)


def draw_survival(told: Mapping[str, Sequence[tuple[float, int]]], killed_at: float) -> Figure:
    """Answers told token by token, with a line where replica 1 was killed.

    told: by the request's number, (second, replica) of each of its tokens.
    """
    rows = sorted(told, key=int)
    with course_style():
        figure = Figure(figsize=(WIDTH, 2.9))
        axes = figure.add_subplot()
        for row, name in enumerate(rows):
            for replica, colour, marker in ((0, ORANGE, "o"), (1, BLUE, "s")):
                own = [second for second, where in told[name] if where == replica]
                axes.plot(own, [row] * len(own), marker=marker, linestyle="none", markersize=4, color=colour,
                          label=f"token from replica {replica}")  # fmt: skip
        axes.axvline(killed_at, color=VERMILION, linewidth=1.5)
        axes.text(killed_at, -0.85, " replica 1 is killed", color=VERMILION, size=9, va="center")
        axes.set(xlabel="seconds", ylabel="request", ylim=(len(told) - 0.4, -1.4), xlim=(0, None))
        axes.set_yticks(range(len(rows)), rows)
        handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(handles.values(), handles.keys(), loc="upper right", ncols=2)
    return figure
