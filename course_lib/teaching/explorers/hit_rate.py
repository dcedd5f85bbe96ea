"""What a prefix cache finds again: by its size, the order of the requests, their salts, and what it forgets first.

Invariant: `draw_*` and `describe_*` depend on nothing but their arguments, which are recorded replays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.teaching.explorers.figures import explore_controls
from course_lib.teaching.explorers.style import (
    BLUE,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    SKY,
    WIDTH,
    boxes,
    canvas,
    course_style,
    tint,
)  # fmt: skip
from course_lib.teaching.recording.replay import Moment, Replay, Sweeps

MARKERS = "os^Dv"
EVENT = 1.1  # inches for the text beside a queue


def draw_hit_rates(curves: Mapping[str, Sequence[Replay]]) -> Figure:
    """Hit rate over the size of the cache; one curve for each entry."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, replays), marker in zip(curves.items(), MARKERS, strict=False):
            _curve(axes, replays, label=name, marker=marker, markersize=4)
        _label(axes)
        axes.legend(loc="lower right")
    return figure


def _curve(axes: Axes, replays: Sequence[Replay], **look: Any) -> None:
    axes.plot([one.num_blocks for one in replays], [100 * one.hit_rate for one in replays], **look)


def _label(axes: Axes) -> None:
    axes.set(xlabel="size of the cache, blocks", ylabel="% of prompt tokens found", ylim=(0, 100))
    axes.grid(axis="y", color=LINE)


# ---- the explorer -------------------------------------------------------------------------------


def draw_hits(sweeps: Sweeps, chosen: tuple[str, ...], num_blocks: int) -> Figure:
    """The chosen sweep's curve among the others, and, at one size, what each request found.

    Raises KeyError for what was not swept, ValueError for a size that was not replayed.
    """
    now = _at(sweeps[chosen], num_blocks)
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(5, 6))
        others = [replays for key, replays in sweeps.items() if key[0] == chosen[0] and key != chosen]
        for i, replays in enumerate(others):
            look = {"color": MUTED, "linewidth": 1, "linestyle": ":"}
            _curve(left, replays, label="the other choices" if i == 0 else None, **look)
        _curve(left, sweeps[chosen], color=BLUE, linewidth=2)
        left.plot(now.num_blocks, 100 * now.hit_rate, marker="o", markersize=9, color=BLUE)
        left.axvline(now.num_blocks, color=BLUE, linewidth=0.8)
        left.set_title(f"{100 * now.hit_rate:.0f} % found")
        _label(left)
        if others:
            left.legend(loc="lower right")
        places = range(len(now.prompt_tokens))
        computed = [length - found for length, found in zip(now.prompt_tokens, now.found_tokens, strict=True)]
        right.bar(places, now.found_tokens, width=0.8, color=SKY, label="found")
        right.bar(places, computed, bottom=now.found_tokens, width=0.8, color=tint(ORANGE, 0.5), edgecolor=INK,
                  hatch="////", linewidth=0, label="computed")  # fmt: skip
        right.set(xlabel="request, in the order asked", ylabel="tokens of its prompt")
        right.set_title(f"{now.computed_tokens:,} tokens computed, {now.num_evictions} blocks evicted")
        right.set_ylim(0, 1.25 * max(now.prompt_tokens))
        right.legend(loc="upper center", ncols=2)
    return figure


def describe_hits(sweeps: Sweeps, chosen: tuple[str, ...], num_blocks: int) -> str:
    """What `draw_hits` shows, in words. Takes and raises the same."""
    now = _at(sweeps[chosen], num_blocks)
    nothing = sum(found == 0 for found in now.found_tokens)
    return (
        f"{', '.join(chosen)}, {num_blocks} blocks: {sum(now.found_tokens):,} of {sum(now.prompt_tokens):,} prompt "
        f"tokens found ({100 * now.hit_rate:.0f} %), {now.num_evictions} blocks evicted; "
        f"{nothing} of {len(now.found_tokens)} requests found nothing."
    )


def _at(replays: Sequence[Replay], num_blocks: int) -> Replay:
    for one in replays:
        if one.num_blocks == num_blocks:
            return one
    raise ValueError(f"num_blocks={num_blocks}: replayed were {', '.join(str(one.num_blocks) for one in replays)}")


def explore_hits(sweeps: Sweeps, names: Sequence[str], start: int) -> None:
    """Display hit rates with a choice for each thing that was varied, and a slider for the size of the cache.

    Args:
        sweeps: one entry for each combination of choices, all over the same sizes; the first is shown first.
        names: what each part of an entry's key says, such as ("requests", "order").
        start: the size at first, in blocks.
    """
    import ipywidgets as widgets

    first = next(iter(sweeps))
    sizes = [one.num_blocks for one in sweeps[first]]
    describe_hits(sweeps, first, start)  # a size that was not replayed is refused in words
    wide = {"style": {"description_width": "8em"}, "layout": widgets.Layout(width="60%")}
    controls = {
        f"choice_{i}": widgets.Dropdown(options=list(dict.fromkeys(key[i] for key in sweeps)), description=name, **wide)
        for i, name in enumerate(names)
    }
    controls["num_blocks"] = widgets.SelectionSlider(options=sizes, value=start, description="blocks", **wide)

    def at(num_blocks: int, **choices: str) -> tuple[Sweeps, tuple[str, ...], int]:
        return sweeps, tuple(choices[f"choice_{i}"] for i in range(len(names))), num_blocks

    explore_controls(
        lambda **settings: draw_hits(*at(**settings)),
        lambda **settings: describe_hits(*at(**settings)),
        controls,
        widgets.VBox([*controls.values()]),
    )


# ---- the free queue -----------------------------------------------------------------------------


def draw_queues(columns: Mapping[str, Sequence[Moment]]) -> Figure:
    """Free queues, a row for each moment, one column beside the other."""
    longest = max(len(one.queue) for moments in columns.values() for one in moments)
    rows = max(map(len, columns.values()))
    room = (WIDTH - 0.2) / len(columns)  # inches, as all below
    width, height, top = min(0.62, (room - EVENT - 0.2) / longest), 0.52, 0.72
    with course_style():
        figure, axes = canvas(top + rows * (height + 0.1) + 0.05)
        for number, (title, moments) in enumerate(columns.items()):
            left = 0.2 + number * room
            axes.text(left, 0.3, title, size=11, weight="bold")
            axes.text(left + EVENT, top - 0.1, "front: given away next", size=8, color=MUTED)
            for i, moment in enumerate(moments):
                y = top + i * (height + 0.1)
                axes.text(left, y + height / 2, moment.event, size=8.5, va="center")
                for place, (block_id, content) in enumerate(moment.queue):
                    x, middle = left + EVENT + place * width, left + EVENT + (place + 0.5) * width - 0.02
                    fill = tint(SKY, 0.4) if content else PAPER
                    boxes(axes, [(x, y, width - 0.04, height)], facecolor=fill, edgecolor=MUTED, linewidth=0.8)
                    axes.text(middle, y + 0.12, block_id, size=8.5, weight="bold", ha="center", va="center")
                    axes.text(middle, y + 0.35, content.strip().replace(" ", "\n") or "–", size=6.5, ha="center",
                              va="center", linespacing=0.95)  # fmt: skip
    return figure
