"""What the scheduler decided: the tokens of each step, and each request's way through the steps.

Above, every step's tokens against the token budget, stacked by request in the scheduler's order; below, one
lane for each request. A request that computes a single token, its prompt being computed before, decodes;
anything else is prefill, also what a preempted request computes again.

Invariant: `draw_schedule` and `describe_schedule` depend on nothing but their arguments, and the figure has
the same size at every step of a trace.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from course_lib.teaching.explorers.figures import explore
from course_lib.teaching.explorers.style import (
    INK,
    LINE,
    MUTED,
    PAPER,
    PLAIN,
    PREEMPTED,
    WIDTH,
    Mark,
    boxes,
    canvas,
    course_style,
    legend,
    marks,
    name_lanes,
    plural,
    prefill_look,
    tint,
)  # fmt: skip
from course_lib.teaching.recording.trace_data import Step, Trace

# Inches.
LEFT, RIGHT, TOP, BOTTOM = 1.5, WIDTH - 0.25, 0.85, 0.95
BARS_HEIGHT, GAP, LANES_HEIGHT, LANE_HEIGHT = 1.8, 0.2, 3.6, 0.27

MOST_NUMBERED = 60  # steps: the bars of more are too narrow for a number
MOST_LISTED = 12


def explore_schedule(trace: Trace) -> None:
    """Display the schedule with a slider that singles out a step.

    Args:
        trace: what `record` gave.

    Raises:
        ValueError: the trace is empty.
    """
    explore(
        lambda index: draw_schedule(trace, index), lambda index: describe_schedule(trace, index),
        name="step", count=len(trace.steps),
    )  # fmt: skip


def draw_schedule(trace: Trace, step: int | None = None) -> Figure:
    """All steps of the trace; `step` (from 0) is singled out.

    Raises ValueError: the trace is empty, or has no such step.
    """
    facts = describe_schedule(trace, step).partition("\n")[0]
    count = max(1, len(trace.requests))
    lane = min(LANE_HEIGHT, LANES_HEIGHT / count)
    lanes_top = TOP + BARS_HEIGHT + GAP
    height = lanes_top + count * lane + BOTTOM
    look = marks(trace.requests)
    with course_style():
        figure, page = canvas(height)
        page.text(0.25, 0.38, f"The schedule of {plural(len(trace.steps), 'step')}", size=12, weight="bold")
        page.text(0.25, 0.62, facts)
        width = (RIGHT - LEFT) / WIDTH
        bars = figure.add_axes((LEFT / WIDTH, 1 - (TOP + BARS_HEIGHT) / height, width, BARS_HEIGHT / height))
        lanes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, width, count * lane / height), sharex=bars)
        _draw_bars(bars, trace, look)
        _draw_lanes(lanes, trace, look)
        name_lanes(page, 0.25, LEFT - 0.1, lanes_top, lane, look)
        for axes in (bars, lanes):
            if step is not None:
                axes.axvspan(step - 0.5, step + 0.5, facecolor=tint(INK, 0.12), zorder=0.6)
                axes.axvspan(step - 0.5, step + 0.5, facecolor="none", edgecolor=INK, zorder=3)
        legend(page, LEFT, height - 0.25, {
            "prefill": {"facecolor": MUTED} | prefill_look(count), "decode": {"facecolor": tint(MUTED, 0.5)},
            "running, no tokens": {"facecolor": PAPER, "edgecolor": MUTED},
            "waiting": {"facecolor": LINE}, "preempted": PREEMPTED, "end": {"facecolor": INK},
        })  # fmt: skip
    return figure


def describe_schedule(trace: Trace, step: int | None = None) -> str:
    """What `draw_schedule` shows, in words: of the step, or of the whole run. Takes and raises the same."""
    singled_out = trace.step(step or 0)
    letters = {name: mark.letter for name, mark in marks(trace.requests).items()}
    return _describe_run(trace, letters) if step is None else _describe_step(trace, singled_out, letters)


# ---- the facts --------------------------------------------------------------------------------------


def is_prefill(trace: Trace, step: Step, name: str) -> bool:
    """Whether what the step computes for this request is prefill rather than decode."""
    return step.scheduled[name] > 1 or step.computed[name] < trace.requests[name].num_prompt_tokens


@dataclass(slots=True)
class Span:
    """Steps `first` to `last` of one request, in one state."""

    state: str  # "waiting", "prefill", "decode", "held" (running, but given no tokens), "preempted"
    first: int
    last: int


def spans(trace: Trace) -> dict[str, list[Span]]:
    """Each request's way through the steps. Each prefill chunk is a span of its own."""
    ways: dict[str, list[Span]] = {name: [] for name in trace.requests}
    for step in trace.steps:
        states = dict.fromkeys(step.waiting, "waiting") | dict.fromkeys(step.block_tables, "held")
        for name in step.scheduled:
            states[name] = "prefill" if is_prefill(trace, step, name) else "decode"
        for name, state in states.items():
            way = ways[name]
            if state == "waiting" and (way and way[-1].state != "waiting"):
                state = "preempted"  # it ran before
            if way and way[-1].state == state != "prefill":
                way[-1].last = step.index
            else:
                way.append(Span(state, step.index, step.index))
    return ways


def _describe_run(trace: Trace, letters: dict[str, str]) -> str:
    totals = [sum(step.scheduled.values()) for step in trace.steps]
    prefill = sum(
        sum(tokens for name, tokens in step.scheduled.items() if is_prefill(trace, step, name))
        for step in trace.steps
    )
    preemptions = sum(len(step.preempted) for step in trace.steps)
    lines = [
        f"{sum(totals)} tokens, {prefill} of them in prefill · at most {max(totals)} in a step, of a budget "
        f"of {trace.token_budget} · {plural(preemptions, 'preemption')}"
    ]
    ways = spans(trace)
    for name in list(ways)[:MOST_LISTED]:
        parts: list[Span] = []
        for span in ways[name]:
            if parts and parts[-1].state == span.state:  # chunks in a row
                parts[-1].last = span.last
            else:
                parts.append(span)
        told = [f"{it.state} {it.first}" + (f"–{it.last}" if it.last > it.first else "") for it in parts]
        reason = trace.requests[name].reason or "unfinished"
        lines.append(f"{letters[name]} (request {name}): {', '.join(told)}; {reason}.")
    if len(ways) > MOST_LISTED:
        lines.append(f"and {plural(len(ways) - MOST_LISTED, 'more request')}.")
    return "\n".join(lines)


def _describe_step(trace: Trace, step: Step, letters: dict[str, str]) -> str:
    tokens = f"{sum(step.scheduled.values())} of {trace.token_budget} tokens"
    facts = [
        f"Step {step.index} of {len(trace.steps) - 1}: {tokens}", f"{len(step.block_tables)} running",
        f"{len(step.waiting)} waiting", f"{len(step.preempted)} preempted",
    ]  # fmt: skip
    prefill = {name: n for name, n in step.scheduled.items() if is_prefill(trace, step, name)}
    groups = {
        "Prefill": [f"{letters[name]} {n}" for name, n in prefill.items()],
        "Decode": [letters[name] for name in step.scheduled if name not in prefill],
        "Waiting": [letters[name] for name in step.waiting],
        "Preempted": [letters[name] for name in step.preempted],
        "Ends": [f"{letters[name]} ({reason})" for name, reason in step.finished.items()],
    }
    lines = [" · ".join(facts), *(f"{what}: {', '.join(names)}." for what, names in groups.items() if names)]
    lines.append(
        f"Scheduling took {1e3 * step.schedule_s:.1f} ms, the model {1e3 * step.execute_s:.1f} ms, "
        f"the update {1e3 * step.update_s:.1f} ms."
    )
    return "\n".join(lines)


# ---- the figure -------------------------------------------------------------------------------------


def _draw_bars(axes: Axes, trace: Trace, look: dict[str, Mark]) -> None:
    prefill, decode = {}, {}  # rectangle -> colour
    totals = []
    for step in trace.steps:
        base = 0
        for name, tokens in step.scheduled.items():
            kind = prefill if is_prefill(trace, step, name) else decode
            kind[step.index - 0.4, base, 0.8, tokens] = look[name].colour
            base += tokens
        totals.append(base)
    _draw_work(axes, trace, prefill, decode)
    budget, most = trace.token_budget, max(1, *totals)
    label = f"token budget {budget}"
    if budget <= 2 * most:
        top = 1.12 * max(budget, most)
        axes.axhline(budget, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        axes.text(1, (budget + 0.02 * top) / top, label, transform=axes.transAxes, size=8.5, ha="right")
    else:
        top = 1.2 * most
        label += ", far above this axis"
        axes.text(1, 1.03, label, transform=axes.transAxes, size=8.5, ha="right")
    if len(totals) <= MOST_NUMBERED:
        for index, total in enumerate(totals):
            over_line = PLAIN if 0.85 * budget < total < budget else None
            axes.text(index, total + 0.015 * top, total, size=6.5, ha="center", bbox=over_line)
    axes.set(ylim=(0, top), ylabel="tokens in the step")
    axes.tick_params(labelbottom=False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))


def _draw_lanes(axes: Axes, trace: Trace, look: dict[str, Mark]) -> None:
    kinds: dict[str, dict[tuple, str]] = defaultdict(dict)  # state -> rectangle -> the request's colour
    rows = {name: row for row, name in enumerate(trace.requests)}
    for name, way in spans(trace).items():
        for span in way:
            top, height = (0.42, 0.16) if span.state == "waiting" else (0.15, 0.7)
            box = (span.first - 0.5, rows[name] + top, span.last - span.first + 1, height)
            kinds[span.state][box] = look[name].colour
    boxes(axes, list(kinds["waiting"]), facecolor=LINE)
    boxes(axes, list(kinds["held"]), facecolor=PAPER, edgecolors=list(kinds["held"].values()))
    boxes(axes, list(kinds["preempted"]), **PREEMPTED)
    _draw_work(axes, trace, kinds["prefill"], kinds["decode"])
    ends = [(step.index + 0.5, rows[name]) for step in trace.steps for name in step.finished]
    width = 0.004 * len(trace.steps)
    boxes(axes, [(x - width, row + 0.05, 1.5 * width, 0.9) for x, row in ends], facecolor=INK)
    axes.set(xlim=(-0.7, len(trace.steps) - 0.3), ylim=(len(rows), 0), xlabel="step", yticks=[])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))


def _draw_work(axes: Axes, trace: Trace, prefill: dict[tuple, str], decode: dict[tuple, str]) -> None:
    boxes(axes, list(prefill), facecolors=list(prefill.values()), **prefill_look(len(trace.requests)))
    boxes(axes, list(decode), facecolors=[tint(colour, 0.5) for colour in decode.values()])
