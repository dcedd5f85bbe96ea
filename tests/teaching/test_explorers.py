"""The explorers: what they say is what the trace holds, and no label lies on another."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from course_lib.teaching.explorers import (
    describe_blocks,
    describe_requests,
    describe_schedule,
    draw_blocks,
    draw_requests,
    draw_schedule,
    explore_blocks,
    explore_requests,
    explore_schedule,
)  # fmt: skip
from course_lib.teaching.explorers.block_grid import Grid, held_blocks
from course_lib.teaching.explorers.figures import MAX_BYTES, png_bytes
from course_lib.teaching.explorers.requests import phases
from course_lib.teaching.explorers.schedule import Span, is_prefill, spans
from course_lib.teaching.recording.trace import RequestTrace, Step, Trace

pytestmark = pytest.mark.filterwarnings("error")  # a warning would stand above the learner's picture


def small_trace() -> Trace:
    """Eight blocks of four slots; y shares x's first block and is aborted, z is preempted."""
    prompts = {"x": 9, "y": 6, "z": 3}
    requests = {name: RequestTrace(name, prompts[name], 0.01 * i, 0.002) for i, name in enumerate(prompts)}
    x, y, z = requests.values()
    x.first_scheduled = y.first_scheduled = 0.1
    z.first_scheduled, z.num_preemptions = 0.2, 1
    x.first_token, y.first_token, z.first_token = 0.19, 0.19, 0.29
    x.finished, x.reason, x.detokenize_s = 0.6, "length", 0.001
    y.finished, y.reason, y.num_cached_tokens = 0.4, "abort", 4
    for_x, for_y, for_z = (0, 1, 3), (0, 2), (4,)
    plans = [  # scheduled, computed, block tables, waiting, preempted, cached and free, finished
        ({"x": 8, "y": 2}, {"x": 0, "y": 4}, {"x": (0, 1), "y": for_y}, ("z",), (), (), {}),
        ({"x": 1, "z": 3}, {"x": 8, "y": 6, "z": 0}, {"x": for_x, "y": for_y, "z": for_z}, (), (), (7,), {}),
        ({"x": 1, "y": 1}, {"x": 9, "y": 6}, {"x": for_x, "y": for_y}, *[("z",)] * 2, (4, 7), {"y": "abort"}),
        ({"x": 1, "z": 4}, {"x": 10, "z": 0}, {"x": for_x, "z": for_z}, (), (), (2, 7), {}),
        ({"x": 1, "z": 1}, {"x": 11, "z": 4}, {"x": for_x, "z": (4, 5)}, (), (), (7,), {"x": "length"}),
    ]
    steps = []
    for index, (scheduled, computed, tables, waiting, preempted, cached, finished) in enumerate(plans):
        num_free = 8 - len({block for table in tables.values() for block in table})
        sampled = {name: [5] for name in scheduled if computed[name] + scheduled[name] >= prompts[name]}
        steps.append(Step(index, 0.1 * (index + 1), 0.001, scheduled, computed, tables, waiting, preempted,
                          cached, num_free, 0.09, 0.002, sampled, finished))  # fmt: skip
    return Trace(4, 8, 10, 4, steps, requests)


def large_trace(num_blocks: int, num_requests: int, num_steps: int) -> Trace:
    """Every request computes 20 tokens, then one a step; half of the pool is used at the end."""
    names = [f"cmpl-{i:04d}-of-a-long-name" for i in range(num_requests)]
    requests = {name: RequestTrace(name, 20, 0.0, 0.0, 0.1, 1.0, None) for name in names}
    share = num_blocks // (2 * num_requests)
    steps = []
    for index in range(num_steps):
        computed = {name: 0 if index == 0 else 19 + index for name in names}
        tables = {name: tuple(range(i * share, (i + 1) * share)) for i, name in enumerate(names)}
        scheduled = dict.fromkeys(names, 20 if index == 0 else 1)
        cached = tuple(range(num_blocks // 2, num_blocks * 3 // 4))
        steps.append(Step(index, float(index), 0.0, scheduled, computed, tables, (), (), cached,
                          num_blocks - share * num_requests, 1.0))  # fmt: skip
    return Trace(16, num_blocks, 20 * num_requests, num_requests, steps, requests)


TRACES = {
    "small": small_trace(),
    "64 blocks": large_trace(64, 8, 30),
    "240 blocks": large_trace(240, 12, 70),
    "2000 blocks": large_trace(2000, 100, 20),
    "one request": large_trace(4, 1, 1),
}
DRAWN: dict[str, Callable[[Trace], list[Figure]]] = {
    "blocks": lambda trace: [draw_blocks(trace), draw_blocks(trace, len(trace.steps) - 1)],
    "schedule": lambda trace: [draw_schedule(trace), draw_schedule(trace, len(trace.steps) - 1)],
    "requests": lambda trace: [draw_requests(trace), draw_requests(trace, [*trace.requests][-1])],
}


@pytest.mark.parametrize("drawn", DRAWN)
@pytest.mark.parametrize("kind", TRACES)
def test_figures_are_small_alike_and_legible(kind: str, drawn: str) -> None:
    trace = copy.deepcopy(TRACES[kind])
    figures = DRAWN[drawn](trace)
    assert trace == TRACES[kind], "drawing changed the trace"
    assert len({tuple(figure.get_size_inches()) for figure in figures}) == 1, "the figure jumps between steps"
    assert len(png_bytes(figures[0])) <= MAX_BYTES
    assert_labels_are_apart(figures[1])


@pytest.mark.parametrize("drawn", DRAWN)
def test_the_same_trace_makes_the_same_picture(drawn: str) -> None:
    first, second = (png_bytes(DRAWN[drawn](TRACES["small"])[1]) for _ in range(2))
    assert first == second


def labels(axes: Axes) -> list[Text]:
    """The texts that are drawn: no tick labels outside of the axis."""
    found = [*axes.texts]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
        if axes.axison:
            found += [axis.label, *(t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high)]
    return [text for text in found if text.get_text() and text.get_visible()]


def assert_labels_are_apart(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    areas = [(text.get_text(), text.get_window_extent()) for axes in figure.axes for text in labels(axes)]
    for text, area in areas:
        assert figure.bbox.x0 <= area.x0 and area.x1 <= figure.bbox.x1, f"{text!r} is cut off"
        assert figure.bbox.y0 <= area.y0 and area.y1 <= figure.bbox.y1, f"{text!r} is cut off"
    for (one, first), (other, second) in itertools.combinations(areas, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 0.5 or height <= 2, f"{one!r} and {other!r} overlap"  # extents include empty leading


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_blocks_are_told() -> None:
    trace = TRACES["small"]
    assert describe_blocks(trace, 2) == (
        "KV cache at step 2 of 4: 4 of 8 blocks in use, 4 free (2 of them cached) · 4 slots a block · "
        "2 running · 1 waiting · 1 preempted.\n"
        "A (request x): 9 tokens computed, 1 in this step; block table 0 1 3.\n"
        "B (request y): 6 tokens computed, 1 in this step; block table 0 2.\n"
        "Waiting: C.\n"
        "Preempted in this step: C."
    )
    assert describe_blocks(trace).startswith("KV cache at step 1 of 4: 5 of 8 blocks")  # the fullest step
    held = held_blocks(trace, trace.steps[0])
    assert {block: (one.before, one.after, one.owners) for block, one in held.items()} == {
        0: (0, 4, ["x", "y"]), 1: (0, 4, ["x"]), 2: (0, 2, ["y"]),
    }  # fmt: skip


def test_blocks_are_told_apart_without_colour() -> None:
    shown = texts(draw_blocks(TRACES["small"], 2))
    assert shown.count("A") == 4 and shown.count("B") == 3  # one in each block, one beside the table
    assert shown.count("cached") == 2
    assert {"4/4", "2/4", "3/4", "0", "7"} <= {*shown}
    many = texts(draw_blocks(TRACES["2000 blocks"], 3))
    assert "A" in many and len(many) < 120  # letters beside the tables only


@pytest.mark.parametrize("num_blocks", [1, 8, 16, 17, 64, 65, 250, 2000, 30_000])
def test_any_number_of_blocks_fits(num_blocks: int) -> None:
    grid = Grid.of(num_blocks)
    x, y, width, height = grid.cell(num_blocks - 1)
    assert x + width <= 5.75 and y + height <= 5.75 and grid.rows * grid.columns >= num_blocks
    assert grid.has_letters == (num_blocks <= 250) and grid.has_numbers == (num_blocks <= 64)


def test_the_schedule_is_told() -> None:
    trace = TRACES["small"]
    assert describe_schedule(trace) == (
        "23 tokens, 18 of them in prefill · at most 10 in a step, of a budget of 10 · 1 preemption\n"
        "A (request x): prefill 0–1, decode 2–4; length.\n"
        "B (request y): prefill 0, held 1, decode 2; abort.\n"
        "C (request z): waiting 0, prefill 1, preempted 2, prefill 3, decode 4; unfinished."
    )
    assert describe_schedule(trace, 2) == (
        "Step 2 of 4: 2 of 10 tokens · 2 running · 1 waiting · 1 preempted\n"
        "Decode: A, B.\nWaiting: C.\nPreempted: C.\nEnds: B (abort).\n"
        "Scheduling took 1.0 ms, the model 90.0 ms, the update 2.0 ms."
    )
    assert not is_prefill(trace, trace.steps[4], "z")
    assert is_prefill(trace, replace(trace.steps[4], scheduled={"z": 2}), "z")  # computed once before
    assert spans(trace)["x"] == [Span("prefill", 0, 0), Span("prefill", 1, 1), Span("decode", 2, 4)]


def test_the_requests_times_are_told() -> None:
    trace = TRACES["small"]
    assert describe_requests(trace).startswith(
        "3 requests · time to first token (TTFT) 180 ms to 270 ms · total 390 ms to 600 ms\n"
        "A (request x): tokenize 2.0 ms · queue 98 ms · prefill 90 ms · decode 410 ms · detokenize 1.0 ms.\n"
    )
    assert describe_requests(trace, "y").startswith(
        "B (request y): 6 prompt tokens, 4 of them cached · 2 generated · 0 preemptions · abort\n"
    )
    ends = [round(begin + spent, 3) for begin, spent in phases(trace, "x").values()]
    assert ends == [0.002, 0.1, 0.19, 0.6, 0.6]
    assert sum(phases(trace, "z")["decode"]) == pytest.approx(0.593)  # not ended: to the last step's end
    never_served = Trace(4, 8, 10, 4, [], {"q": RequestTrace("q", 3, 1.0, 0.5)})
    assert phases(never_served, "q") == {"tokenize": (1.0, 0.5), "queue": (1.5, 0.0)}
    draw_requests(never_served)


def test_what_is_not_in_the_trace_is_refused() -> None:
    empty = Trace(4, 8, 10, 4)
    for explore in (explore_blocks, explore_schedule, explore_requests):
        with pytest.raises(ValueError, match="generate something inside"):
            explore(empty)
    for draw in (draw_blocks, draw_schedule, describe_blocks, describe_schedule):
        with pytest.raises(ValueError, match="step=5: this trace has steps 0 to 4"):
            draw(TRACES["small"], 5)
    with pytest.raises(ValueError, match="request='w': this trace has 'x', 'y', 'z'"):
        draw_requests(TRACES["small"], "w")


@pytest.mark.parametrize("explore", [explore_blocks, explore_schedule, explore_requests])
def test_an_explorer_is_one_output(explore: Callable[[Trace], None], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    explore(TRACES["small"])
    (bundle,) = shown
    assert bundle.keys() == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
