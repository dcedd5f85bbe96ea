"""What a token's keys depend on: which keys of which layers differ between two texts, and who looks at whom.

Reads keys where the engine keeps them, in the blocks of a request's table, and compares them layer by layer.

Invariant: figures and descriptions are functions of their arguments; reading keys changes nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from course_lib.sampling_params import SamplingParams
from course_lib.teaching.explorers.figures import explore
from course_lib.teaching.explorers.style import (
    BLUE,
    INK,
    MUTED,
    PAPER,
    VERMILION,
    WIDTH,
    boxes,
    course_style,
    plural,
    tint,
)
from course_lib.teaching.recording.scheduling import limited

if TYPE_CHECKING:
    from course_lib import LLM
    from course_lib.core.scheduler import Scheduler
    from course_lib.teaching.recording.trace_data import Trace

SAME = 1e-4  # relative: far above rounding in float32, far below what another context does
_HEAT = LinearSegmentedColormap.from_list("changes", [PAPER, tint(VERMILION, 0.35), VERMILION])


def cached_keys(llm: LLM, request_id: str) -> torch.Tensor:
    """The keys of a running request as the cache holds them: [layers, computed tokens, Hkv * D]."""
    core = llm.llm_engine.core
    [core_id] = llm.llm_engine.frontend.output_processor.core_ids(request_id)
    request = core.scheduler.requests[core_id]
    layers = [layer.kv_cache[0] for layer in core.executor.runner.model.attention_layers()]
    found = [keys[request.block_ids].flatten(0, 1)[: request.num_computed_tokens] for keys in layers]
    return torch.stack(found).flatten(2)


def keys_of(llm: LLM, prompts: Sequence[list[int]]) -> list[torch.Tensor]:
    """The keys of each prompt, all computed in one step and none taken from another: [layers, tokens, Hkv * D].

    Raises ValueError if a step has no room for so many tokens or requests.
    """
    engine, limits = llm.llm_engine, llm.llm_engine.core.config.scheduler
    if sum(map(len, prompts)) > limits.max_num_batched_tokens or len(prompts) > limits.max_num_seqs:
        raise ValueError(
            f"prompts: one step has room for {limits.max_num_batched_tokens} tokens of "
            f"{plural(limits.max_num_seqs, 'request')}; give fewer, or shorter ones"
        )
    with limited(llm, enable_prefix_caching=False):
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=2, ignore_eos=True))
        engine.step()
        return [cached_keys(llm, str(i)) for i in range(len(prompts))]


def difference(keys: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How far keys are from others, both [layers, tokens, Hkv * D], relative to the others: [layers, tokens]."""
    return (keys - others).norm(dim=-1) / others.norm(dim=-1)


@dataclass(frozen=True)
class Evidence:
    """What `examine` found. texts: each job's answer; wrong: [layers, tokens], how far the keys that one request read
    are from its own; books: what `check_invariants` had to say first, after some step."""

    texts: list[str]
    wrong: torch.Tensor
    books: str


def examine(
    llm: LLM, jobs: Sequence[tuple[int, list[int], int]], which: int, bug: AbstractContextManager[object]
) -> Evidence:
    """Serve `jobs` with prefix caching while `bug` is in the engine, and look at what request `which` reads.

    Args:
        jobs: for each request the step at which it arrives, its prompt's token ids, how many tokens to write (2 at least).
        which: its keys, as they are in the cache before its last step, are compared with those of the same text alone.
        bug: is entered while the jobs are served, such as a `mock.patch`.
    """
    engine, texts, books = llm.llm_engine, {}, "the books are in order"
    with bug, limited(llm, enable_prefix_caching=True):
        step = 0
        while len(texts) < len(jobs):
            for i, (arrival, prompt, length) in enumerate(jobs):
                if arrival == step:
                    engine.add_request(
                        str(i), prompt, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
                    )
            for output in engine.step():
                if output.finished:
                    texts[int(output.request_id)] = output.outputs[0].text
                elif output.request_id == str(which):
                    keys = cached_keys(llm, str(which))
                    tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            books = books if books != "the books are in order" else _audit(engine.core.scheduler)
            step += 1
    [own] = keys_of(llm, [tokens[: keys.shape[1]]])
    return Evidence([texts[i] for i in range(len(jobs))], difference(keys, own), books)


def _audit(scheduler: Scheduler) -> str:
    try:
        scheduler.check_invariants()
    except AssertionError as broken:
        return str(broken)
    return "the books are in order"


def explore_change(tokens: Sequence[str], changes: torch.Tensor, block_size: int, start: int = 0) -> None:
    """Display which keys differ when one token is replaced, with a slider over the tokens.

    Args:
        tokens: the text's, as text.
        changes: [tokens, layers, tokens]: the `difference` when token i is replaced.
        block_size: tokens per block.
        start: the token to begin with.
    """
    explore(
        lambda at: draw_change(tokens, changes[at], at, block_size),
        lambda at: describe_change(tokens, changes[at], at, block_size),
        name="token", count=len(tokens), start=start, still=start,
    )  # fmt: skip


def draw_change(tokens: Sequence[str], change: torch.Tensor, at: int, block_size: int) -> Figure:
    """Layers against tokens, darker where keys differ; below, which blocks still hold the right ones."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        axes = figure.subplots()
        _draw_heat(axes, change, block_size)
        axes.set_title(f"{tokens[at].strip()!r} is replaced: whose keys change? (darker: by more, from 0.01 to 100 %)")
        axes.set_xticks(range(len(tokens)), [token.strip() for token in tokens])
        axes.get_xticklabels()[at].set(color=VERMILION, weight="bold")
        axes.tick_params(axis="x", length=0, labelsize=9)
        foot = axes.secondary_xaxis("bottom")
        blocks = [range(first, min(first + block_size, len(tokens))) for first in range(0, len(tokens), block_size)]
        foot.set_xticks([(block[0] + block[-1]) / 2 for block in blocks],
                        ["\n" + _verdict(i, block, change, block_size) for i, block in enumerate(blocks)])  # fmt: skip
        foot.tick_params(axis="x", length=0, labelsize=9, pad=8)
    return figure


def describe_change(tokens: Sequence[str], change: torch.Tensor, at: int, block_size: int) -> str:
    """What `draw_change` shows, in words."""
    differs = change > SAME
    later = [plural(int(row.sum()), "token") for row in (differs[0], differs[1:].any(dim=0))]
    blocks = [range(first, min(first + block_size, len(tokens))) for first in range(0, len(tokens), block_size)]
    verdicts = "; ".join(_verdict(i, block, change, block_size) for i, block in enumerate(blocks))
    return (
        f"Token {at}, {tokens[at].strip()!r}, is replaced by another. In layer 0 the keys of {later[0]} differ, in the "
        f"layers above those of {later[1]}. {verdicts[0].upper()}{verdicts[1:]}."
    )


def _verdict(index: int, block: range, change: torch.Tensor, block_size: int) -> str:
    if bool((change[:, block.start : block.stop] > SAME).any()):
        return f"block {index} differs"
    return f"block {index} is the same" + (", not full" if len(block) < block_size else "")


def draw_wrong_keys(panels: Mapping[str, torch.Tensor], block_size: int) -> Figure:
    """One panel for each suspect: layers against positions, darker where keys differ. Values: [layers, tokens]."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
        widths = [change.shape[1] for change in panels.values()]
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (name, change) in zip(row, panels.items(), strict=True):
            _draw_heat(axes, change, block_size)
            axes.set(title=name, xticks=range(0, change.shape[1], block_size))
        for axes in row[1:]:
            axes.set_ylabel("")
        figure.supxlabel("position in the request (lines: blocks; coloured: a key that is not its own;\n"
                         "darker: by more, from 0.01 to 100 %)", size=9)  # fmt: skip
    return figure


def _draw_heat(axes: Axes, change: torch.Tensor, block_size: int) -> None:
    """Differences from SAME to 1, on a logarithmic scale; layer 0 at the bottom, lines between blocks."""
    shown = change.clamp(min=SAME).log10()
    axes.imshow(shown.numpy(), cmap=_HEAT, vmin=math.log10(SAME), vmax=0, aspect="auto", origin="lower",
                interpolation="none")  # fmt: skip
    layers, length = change.shape
    for border in range(block_size, length, block_size):
        axes.axvline(border - 0.5, color=INK, linewidth=1)
    axes.set(ylabel="layer", yticks=[0, 10, 20, layers - 1] if layers > 25 else range(layers))
    for side in axes.spines.values():
        side.set_visible(True)


def draw_waits(runs: Mapping[str, Trace]) -> Figure:
    """Tokens computed and seconds to the first token of each request, one bar for each run; one request at a time."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        panels = figure.subplots(1, 2)
        for i, (name, trace) in enumerate(runs.items()):
            places = [1 + number + 0.4 * (i - (len(runs) - 1) / 2) for number in range(len(trace.requests))]
            tokens = [sum(step.scheduled.get(request, 0) for step in trace.steps) for request in trace.requests]
            waits = [request.ttft for request in trace.requests.values()]
            for axes, heights in zip(panels, (tokens, waits), strict=True):
                axes.bar(places, heights, width=0.4, label=name)
        for axes, what in zip(panels, ("tokens computed", "s to the first token"), strict=True):
            axes.set(xlabel="prompt", ylabel=what, xticks=range(1, len(trace.requests) + 1))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(runs))
    return figure


def draw_hits(shares: Sequence[float], measured: Sequence[float], theory: Sequence[float]) -> Figure:
    """Seconds to the first token over the share of the prompt that is cached (0 to 1), as measured and as expected."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
        axes = figure.subplots()
        percent = [100 * share for share in shares]
        axes.plot(percent, measured, marker="o", linestyle="none", label="measured")
        axes.plot(percent, theory, color=MUTED, linestyle="--", label="a step's fixed cost, and the rows that are left")
        axes.set(xlabel="% of the prompt in the cache", ylabel="s to the first token", ylim=(0, None))
        axes.legend()
    return figure


def draw_triangle(tokens: Sequence[str], start: int, block_size: int) -> Figure:
    """Who looks at whom: in a prefill of all tokens, and in one that starts at `start`."""
    with course_style():
        figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, first, title in zip(
            panels, (0, start), ("all from the beginning", f"from token {start} on"), strict=True
        ):
            _draw_looks(axes, tokens, first, block_size)
            pairs = sum(range(first + 1, len(tokens) + 1))
            axes.set_title(f"{title}: {plural(len(tokens) - first, 'row')}, {pairs} looks")
        panels[0].set_ylabel("query of token")
    return figure


def _draw_looks(axes: Axes, tokens: Sequence[str], first: int, block_size: int) -> None:
    count = len(tokens)
    cells = [(key, query) for query in range(count) for key in range(query + 1)]
    size = 0.86
    done = [(key - size / 2, query - size / 2, size, size) for key, query in cells if query < first]
    now = [(key - size / 2, query - size / 2, size, size) for key, query in cells if query >= first]
    boxes(axes, done, facecolor="none", edgecolor=MUTED, linestyle=":", linewidth=0.8)
    boxes(axes, now, facecolor=tint(BLUE, 0.55), edgecolor=BLUE)
    labels = [token.strip() for token in tokens]
    axes.set(xlim=(-0.6, count - 0.4), ylim=(count - 0.4, -0.6), xlabel="key of token (line: a new block)")
    axes.set_xticks(range(count), labels)
    axes.set_yticks(range(count), labels)
    for query in range(first):
        axes.get_yticklabels()[query].set_color(MUTED)
    for border in range(block_size, count, block_size):
        axes.axvline(border - 0.5, color=INK, linewidth=1)
    axes.tick_params(length=0)
