"""Where each request's time went: a waterfall from its arrival to its last token.

Tokenizing and waiting in the queue come first; prefill lasts from the first step that serves the request to
its first token, decode from there to the end. Detokenizing is spread over the steps; what it took in all is
drawn at the end of the bar, as a part of it.

Invariant: `draw_requests` and `describe_requests` depend on nothing but their arguments.
"""

from __future__ import annotations

import itertools

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.teaching.explorers.figures import explore
from course_lib.teaching.explorers.schedule import spans
from course_lib.teaching.explorers.style import (
    INK,
    LINE,
    MUTED,
    PAPER,
    PREEMPTED,
    WIDTH,
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
from course_lib.teaching.recording.trace_data import Trace

# Inches. Right of the bars are two columns of numbers, which end at TTFT and TOTAL.
LEFT, RIGHT, TTFT, TOTAL, TOP, BOTTOM = 1.5, 7.3, 8.05, WIDTH - 0.25, 1.1, 0.95
TALL_LANE, LANE, LANES_HEIGHT = 0.46, 0.26, 4.0
MOST_LISTED = 12
MOST_TALL = 10  # requests: the lanes of as many have room for a line of numbers

LOOKS = {
    "tokenize": {"facecolor": INK, "zorder": 1.1}, "queue": {"facecolor": LINE}, "prefill": {}, "decode": {},
    "detokenize": {"facecolor": PAPER, "edgecolor": INK, "linewidth": 0.9}, "preempted": PREEMPTED,
}  # fmt: skip


def explore_requests(trace: Trace) -> None:
    """Display the waterfall with a slider that singles out a request.

    Args:
        trace: what `record` gave.

    Raises:
        ValueError: the trace has no requests.
    """
    names = list(trace.requests)

    def name(index: int | None) -> str | None:
        return None if index is None else names[index]

    explore(
        lambda index: draw_requests(trace, name(index)), lambda index: describe_requests(trace, name(index)),
        name="request", count=len(names),
    )  # fmt: skip


def draw_requests(trace: Trace, request: str | None = None) -> Figure:
    """All requests of the trace; `request` (its name in the trace) is singled out.

    Raises ValueError: the trace has no requests, or none of this name.
    """
    facts = describe_requests(trace, request).partition("\n")[0]
    count = len(trace.requests)
    lane = TALL_LANE if count <= MOST_TALL else min(LANE, LANES_HEIGHT / count)
    height = TOP + count * lane + BOTTOM
    look = marks(trace.requests)
    with course_style():
        figure, page = canvas(height)
        page.text(0.25, 0.38, "Where the time of each request went", size=12, weight="bold")
        page.text(0.25, 0.62, facts)
        name_lanes(page, 0.25, LEFT - 0.1, TOP, lane, look)
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, (RIGHT - LEFT) / WIDTH, count * lane / height))
        _draw_phases(axes, trace, lane)
        if request is not None:
            row = list(trace.requests).index(request)
            axes.axhspan(row, row + 1, facecolor=tint(INK, 0.1), edgecolor=INK, zorder=0.6)
        if lane > 0.2:
            _write_totals(page, trace, lane)
        legend(page, 0.25, height - 0.25, LOOKS | {
            "prefill": {"facecolor": MUTED} | prefill_look(count), "decode": {"facecolor": tint(MUTED, 0.5)},
        })  # fmt: skip
        page.text(RIGHT, height - 0.25, "▼ first token", size=8.5, va="center")
    return figure


def describe_requests(trace: Trace, request: str | None = None) -> str:
    """What `draw_requests` shows, in words: of one request, or of all. Takes and raises the same."""
    if not trace.requests:
        raise ValueError("the trace has no requests: generate something inside `with record(llm) as trace:`")
    if request is not None and request not in trace.requests:
        known = ", ".join(map(repr, list(trace.requests)[:MOST_LISTED]))
        raise ValueError(f"request={request!r}: this trace has {known}")
    look = marks(trace.requests)
    if request is not None:
        one = trace.requests[request]
        generated = sum(len(step.sampled.get(request, ())) for step in trace.steps)
        facts = [
            f"{look[request].letter} (request {request}): {plural(one.num_prompt_tokens, 'prompt token')}, "
            f"{one.num_cached_tokens} of them cached", f"{generated} generated",
            plural(one.num_preemptions, "preemption"), one.reason or "unfinished",
        ]  # fmt: skip
        return f"{' · '.join(facts)}\n{_describe_phases(trace, request)}."
    facts = [plural(len(trace.requests), "request")]
    for what, name in (("time to first token (TTFT)", "ttft"), ("total", "total")):
        known = [value for one in trace.requests.values() if (value := getattr(one, name)) is not None]
        if known:
            least_and_most = dict.fromkeys((_seconds(min(known)), _seconds(max(known))))
            facts.append(f"{what} {' to '.join(least_and_most)}")
    lines = [" · ".join(facts)]
    for name in list(trace.requests)[:MOST_LISTED]:
        lines.append(f"{look[name].letter} (request {name}): {_describe_phases(trace, name)}.")
    if len(trace.requests) > MOST_LISTED:
        lines.append(f"and {plural(len(trace.requests) - MOST_LISTED, 'more request')}.")
    return "\n".join(lines)


# ---- the facts --------------------------------------------------------------------------------------


def phases(trace: Trace, name: str) -> dict[str, tuple[float, float]]:
    """When each phase of a request began and how long it took, in seconds; only phases that it reached."""
    request = trace.requests[name]
    last = trace.steps[-1] if trace.steps else None
    end = request.finished
    if end is None:
        end = last.start + last.schedule_s + last.execute_s + last.update_s if last else request.arrival
    begins = {"tokenize": request.arrival, "queue": request.arrival + request.tokenize_s,
              "prefill": request.first_scheduled, "decode": request.first_token}  # fmt: skip
    reached = [(phase, begin) for phase, begin in begins.items() if begin is not None]
    found = {}
    for (phase, begin), (_, until) in itertools.pairwise([*reached, ("end", end)]):
        found[phase] = (begin, max(0.0, until - begin))
    if request.first_token is not None:
        found["detokenize"] = (end - request.detokenize_s, request.detokenize_s)
    return found


def _describe_phases(trace: Trace, name: str) -> str:
    return " · ".join(f"{phase} {_seconds(spent)}" for phase, (_, spent) in phases(trace, name).items())


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.0f} ms" if value >= 0.01 else f"{1e3 * value:.1f} ms"


# ---- the figure -------------------------------------------------------------------------------------


def _draw_phases(axes: Axes, trace: Trace, lane: float) -> None:
    tall = lane == TALL_LANE
    look, ways = marks(trace.requests), spans(trace)
    found = {name: phases(trace, name) for name in trace.requests}
    begin = min(start for one in found.values() for start, _ in one.values())
    end = max(start + spent for one in found.values() for start, spent in one.values())
    least = 0.004 * (end - begin)  # three pixels: what is shorter is still seen
    top, bar = (0.14, 0.42) if tall else (0.15, 0.7)
    kinds: dict[str, dict[tuple, str]] = {phase: {} for phase in LOOKS}  # rectangle -> the request's colour
    for row, (name, one) in enumerate(found.items()):
        for phase, (start, spent) in one.items():
            y, height = (row + top + 0.38 * bar, 0.24 * bar) if phase == "queue" else (row + top, bar)
            kinds[phase][start, y, max(spent, least), height] = look[name].colour
        for span in ways[name]:
            if span.state == "preempted":
                until = trace.steps[span.last + 1].start if span.last + 1 < len(trace.steps) else end
                start = trace.steps[span.first].start
                kinds["preempted"][start, row + top, until - start, bar] = look[name].colour
        if tall:
            told = _describe_phases(trace, name)
            axes.text(begin, row + 0.82, told, size=7.5, color=MUTED, va="center_baseline")
    for phase, style in LOOKS.items():
        if phase == "prefill":
            style = {"facecolors": list(kinds[phase].values())} | prefill_look(len(found))
        elif phase == "decode":
            style = {"facecolors": [tint(colour, 0.5) for colour in kinds[phase].values()]}
        boxes(axes, list(kinds[phase]), **style)
    first = {row + top: one["decode"][0] for row, one in enumerate(found.values()) if "decode" in one}
    axes.scatter([*first.values()], [*first], marker="v", s=min(4.5, 72 * lane) ** 2, color=INK, zorder=3)
    margin = 0.01 * (end - begin)
    axes.set(xlim=(begin - margin, end + margin), ylim=(len(found), 0), yticks=[])
    axes.set_xlabel("seconds since the recording began")
    axes.spines["left"].set_visible(False)
    if not tall:
        axes.grid(axis="x")


def _write_totals(page: Axes, trace: Trace, lane: float) -> None:
    for x, what in ((TTFT, "TTFT"), (TOTAL, "total")):
        page.text(x, TOP - 0.08, what, size=8.5, color=MUTED, ha="right")
    for row, one in enumerate(trace.requests.values()):
        y = TOP + (row + 0.5) * lane
        for x, value in ((TTFT, one.ttft), (TOTAL, one.total)):
            page.text(x, y, _seconds(value), size=8.5, ha="right", va="center_baseline")
