"""Replicas that share experts, pass by pass: real passes, dummy passes, agreements, sleep; or nobody gets on.

`play` is the two ranks of the lesson without delays: every message arrives at once, so what is seen is the
rule and not its races. Invariant: with dummy passes both ranks are in the same pass at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.engine.coordinator import WaveMember
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
    plural,
    tint,
)

REQUESTS = ((0, 0, 5), (2, 1, 2), (12, 1, 3))  # tick of arrival, rank, passes that it needs
TIME_LIMIT = 6  # ticks that a rank waits for the others before it gives up
COLOURS = (ORANGE, BLUE)
LOOKS = {
    "dummy": {"facecolor": PAPER, "edgecolor": MUTED, "hatch": "//////", "linewidth": 0.8},
    "waits": {"facecolor": tint(VERMILION, 0.15), "edgecolor": VERMILION, "linewidth": 0.8},
}
LEFT, TOP, LANE, BOTTOM = 0.95, 1.35, 0.42, 1.0  # inches


@dataclass(frozen=True, slots=True)
class Played:
    """`ticks[rank]`: "real", "dummy", "asleep" or "waits", tick by tick; `agreements`: the ticks after which
    all agreed, and whether that ended the wave."""

    ticks: tuple[list[str], ...]
    agreements: list[tuple[int, bool]]
    gave_up: bool


def play(every: int, dummies: bool = True, requests: Sequence[tuple[int, int, int]] = REQUESTS) -> Played:
    """Run all requests on two ranks that agree every `every` passes; without dummy passes a rank that has no
    request takes part in none, and the other one waits."""
    members = [WaveMember(every) for _ in range(2)]
    left, ticks, agreements = [0, 0], ([], []), []
    last, tick, waited = max(arrival for arrival, _, _ in requests), 0, 0
    while tick <= last or any(left) or any(member.running for member in members):
        for arrival, rank, needs in requests:
            if arrival == tick:
                left[rank] += needs
                for member in members:
                    member.on_start(member.wave)
        stuck = not dummies and 0 in left and any(left)
        for rank, member in enumerate(members):
            idle = "dummy" if dummies and member.running else "asleep"
            ticks[rank].append(("waits" if stuck else "real") if left[rank] else idle)
            left[rank] -= left[rank] > 0 and not stuck
        tick, waited = tick + 1, waited + 1 if stuck else 0
        if waited == TIME_LIMIT:
            return Played(ticks, agreements, True)
        if not stuck and members[0].running and all([member.after_pass() for member in members]):
            over = all([member.agreed(any(left)) for member in members])
            agreements.append((tick, over))
    return Played(ticks, agreements, False)


def draw_waves(every: int = 4, dummies: bool = True) -> Figure:
    """Two lanes over ticks; a bar through both where all agree."""
    played = play(every, dummies)
    height = TOP + 2 * LANE + BOTTOM
    count = max(len(played.ticks[0]), 20)
    cell = (WIDTH - LEFT - 0.3) / count
    with course_style():
        figure, page = canvas(height)
        page.text(0.25, 0.35, _headline(played, every), size=12, weight="bold")
        page.text(0.25, 0.62, _counts(played), size=9, color=MUTED)
        for rank, kinds in enumerate(played.ticks):
            y = TOP + rank * LANE
            page.text(0.25, y + LANE / 2, f"rank {rank}", size=9, weight="bold", va="center")
            page.plot([LEFT, LEFT + count * cell], [y + LANE - 0.06] * 2, color=LINE, linewidth=0.8)
            for at, kind in enumerate(kinds):
                if kind == "asleep":
                    continue
                look = LOOKS.get(kind, {"facecolor": tint(COLOURS[rank], 0.5), "edgecolor": COLOURS[rank]})
                boxes(page, [(LEFT + at * cell + 0.02, y + 0.06, cell - 0.04, LANE - 0.12)], **look)
        _agreements(page, played, cell)
        _arrivals(page, cell)
        legend(page, LEFT, height - 0.22, _looks_of(played))
    return figure


def _looks_of(played: Played) -> dict[str, dict]:
    """What is in the picture, and how it looks."""
    kinds = {kind for lane in played.ticks for kind in lane} | {over for _, over in played.agreements}
    looks = {
        "real": ("pass with tokens", {"facecolor": tint(ORANGE, 0.5), "edgecolor": ORANGE}),
        "dummy": ("dummy pass", LOOKS["dummy"]),
        "waits": ("waits for the other", LOOKS["waits"]),
        False: ("agreement", {"facecolor": MUTED}),
        True: ("the wave ends", {"facecolor": VERMILION}),
    }
    return dict(look for kind, look in looks.items() if kind in kinds)


def describe_waves(every: int = 4, dummies: bool = True) -> str:
    """What the picture shows."""
    played = play(every, dummies)
    lines = [f"{_headline(played, every)} {_counts(played)}"]
    for rank, kinds in enumerate(played.ticks):
        lines.append(f"Rank {rank}: {', '.join(_runs(kinds))}.")
    return "\n".join(lines)


def explore_waves() -> None:
    """Display the two ranks with a slider for the agreements and a switch for the dummy passes."""
    import ipywidgets as widgets

    every = widgets.IntSlider(4, 1, 8, description="agree every")
    dummies = widgets.Checkbox(True, description="dummy passes")
    explore_controls(
        draw_waves, describe_waves, {"every": every, "dummies": dummies}, widgets.HBox([every, dummies])
    )


def _headline(played: Played, every: int) -> str:
    if played.gave_up:
        return "No dummy passes: a rank waits in its first layer with experts, until its time limit."
    return f"They agree every {'pass' if every == 1 else f'{every} passes'}."


def _counts(played: Played) -> str:
    if played.gave_up:
        real = sum(kinds.count("real") for kinds in played.ticks)
        return f"{real} passes with tokens: where both have requests. Then one sleeps, and the other waits."
    flat = [kind for kinds in played.ticks for kind in kinds]
    waves = sum(over for _, over in played.agreements)
    return (
        f"{flat.count('real')} passes with tokens, {flat.count('dummy')} dummy passes, "
        f"{plural(len(played.agreements), 'agreement')}, {plural(waves, 'wave')}."
    )


def _runs(kinds: list[str]) -> list[str]:
    runs: list[tuple[str, int]] = []
    for kind in kinds:
        count = runs.pop()[1] if runs and runs[-1][0] == kind else 0
        runs.append((kind, count + 1))
    return [f"{count} {kind}" for kind, count in runs]


def _agreements(page: Axes, played: Played, cell: float) -> None:
    for tick, over in played.agreements:
        x = LEFT + tick * cell
        page.plot([x, x], [TOP - 0.06, TOP + 2 * LANE + 0.06], color=VERMILION if over else MUTED,
                  linewidth=3 if over else 1.6)  # fmt: skip


def _arrivals(page: Axes, cell: float) -> None:
    """Arrows where requests come: those of rank 0 from above, those of rank 1 from below."""
    for arrival, rank, needs in REQUESTS:
        x = LEFT + (arrival + 0.5) * cell
        edge, away = (TOP + 2 * LANE - 0.04, 1) if rank else (TOP + 0.04, -1)
        page.annotate("", xy=(x, edge), xytext=(x, edge + away * 0.34),
                      arrowprops={"arrowstyle": "->", "color": COLOURS[rank], "linewidth": 1.3})  # fmt: skip
        page.text(x, edge + away * 0.44, f"{needs} passes", size=8, ha="center", va="center", color=MUTED)
