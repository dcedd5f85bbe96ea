"""`python3 -m course_lib bench …`: measure, print a table, write a ledger.

Owns the arguments. Every kind that measures returns rows; they are shown as one Markdown table on standard output, and
`--json` keeps them as a ledger. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from course_lib.bench.compare import OURS, WORKERS, measure_compare
from course_lib.bench.ledger import Ledger, Row, read_ledger, write_ledger
from course_lib.bench.machine import describe_machine
from course_lib.bench.table import markdown_table
from course_lib.bench.workloads import WORKLOADS, WorkItem
from course_lib.errors import CourseError
from course_lib.model_store import COURSE_MODEL

__all__ = ["add_bench_arguments", "run_bench"]

_PEERS = ("transformers", "transformers-continuous")  # course_lib.bench.transformers_side
# Options that shape a workload, by workload; any other is refused.
_SHAPES = {
    "single": ("input_len", "output_len"),
    "uniform": ("num_prompts", "input_len", "output_len"),
    "nanovllm": ("num_prompts", "longest_output"),
    "shared-prefix": ("num_prompts", "output_len"),
}
_KERNEL_DTYPES = ("bfloat16", "float16", "float32")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    latency = kinds.add_parser("latency", help="one request: TTFT, TPOT, tokens/s")
    latency.add_argument("--input-len", type=_positive, default=16, help="prompt tokens (default 16)")
    latency.add_argument("--output-len", type=_positive, default=128, help="new tokens (default 128)")
    throughput = kinds.add_parser("throughput", help="output tokens/s of many prompts at once")
    throughput.add_argument("--workload", choices=_SHAPES, default="uniform", help="default uniform: 64 x 64")
    throughput.add_argument("--num-prompts", type=_positive, help="how many (default 64, nanovllm 256)")
    throughput.add_argument(
        "--input-len", type=_positive, nargs=2, metavar=("SHORTEST", "LONGEST"),
        help="prompt lengths, uniform in between (default 16 64)",
    )  # fmt: skip
    throughput.add_argument("--output-len", type=_positive, help="new tokens per prompt (default 64)")
    throughput.add_argument("--longest-output", type=_positive, help="cap of nanovllm's new tokens (default 1024)")
    throughput.add_argument("--peer", choices=_PEERS, help="measure against it, in turn")
    serving = kinds.add_parser("serve-sim", help="requests arriving at random: percentiles of TTFT, TPOT, end-to-end")
    serving.add_argument("--rate", type=_positive_number, default=1.0, help="requests per second (default 1)")
    serving.add_argument("--num-prompts", type=_positive, default=64)
    prefix = kinds.add_parser("prefix-caching", help="with and without, on prompts that share their beginning")
    prefix.add_argument("--num-prompts", type=_positive, default=64, help="at least 5 (default 64)")
    prefix.add_argument("--output-len", type=_positive, default=64, help="new tokens per prompt (default 64)")
    kernels = kinds.add_parser("kernels", help="GB/s and TFLOP/s beside what the machine can do")
    kernels.add_argument("--dtype", choices=_KERNEL_DTYPES, nargs="+", help="default: bfloat16 on a GPU, all on a CPU")
    kernels.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    steps = kinds.add_parser("steps", help="Python time of one engine step: everything but the model")
    steps.add_argument("--num-running", type=_positive, nargs="+", default=[64, 128, 256, 512, 1024])
    steps.add_argument("--num-steps", type=_positive, default=64, help="steps per repeat (default 64)")
    ladder = kinds.add_parser("ladder", help="on a GPU: what each of the engine's ideas brings")
    ladder.add_argument("--workload", choices=("single", "uniform", "nanovllm"), nargs="+",
                        default=["single", "uniform", "nanovllm"])  # fmt: skip
    ladder.add_argument("--num-prompts", type=_positive, help="cut uniform and nanovllm to so many")
    ladder.add_argument("--peer-output", type=_positive, default=512,
                        help="cap of nanovllm's new tokens for transformers (default 512)")  # fmt: skip
    ladder.add_argument("--cell-seconds", type=_positive, default=45,
                        help="no further repeat of one rung on one workload after so long (default 45)")  # fmt: skip
    for kind in (latency, throughput, serving, prefix, steps, ladder):
        _add_engine_arguments(kind, whole=kind in (latency, throughput, serving, prefix))
    compare = kinds.add_parser("compare", help="against other engines, set up on the way")
    _add_compare_arguments(compare)
    for kind in (latency, throughput, serving, prefix, kernels, steps, ladder, compare):
        kind.add_argument("--repeats", type=_positive, default=3)
        kind.add_argument("--json", type=Path, help="write the ledger to this file")
    for name, text in (("table", "compare ledgers, in Markdown"), ("plot", "draw ledgers")):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("ledgers", type=Path, nargs="+", metavar="LEDGER")
        if name == "plot":
            kind.add_argument("--output", type=Path, required=True, help="picture to write: .png or .svg")


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    peers = [name for name in WORKERS if name != OURS]
    parser.add_argument("--peer", choices=peers, nargs="+", required=True, help="set up in an environment of its own")
    parser.add_argument("--model", default=COURSE_MODEL, help="folder or model id (default: the course model)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of this engine; several are several sides")
    parser.add_argument("--peer-dtype", nargs="+", default=["float32"], help="of the peers")
    parser.add_argument("--workload", nargs="+", choices=("single", "uniform", "nanovllm"),
                        default=["single", "uniform"])  # fmt: skip
    parser.add_argument("--num-prompts", type=_positive, default=32, help="of workload nanovllm (default 32)")
    parser.add_argument("--threads", type=_positive, help="for each side (default: all cores)")


def _add_engine_arguments(parser: argparse.ArgumentParser, *, whole: bool) -> None:
    parser.add_argument("--model", help="folder or model id (default: the course model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    if whole:
        parser.add_argument("--max-model-len", type=_positive, default=2048)
        parser.add_argument("--max-num-seqs", type=_positive, help="seats (default 256)")
        parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")


def run_bench(args: argparse.Namespace) -> int:
    """Measure one kind, or show ledgers. Returns the exit status."""
    if args.kind in ("table", "plot"):
        return _show(args)
    try:
        measure = _MEASURES[args.kind](args)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    arguments = {name: value for name, value in vars(args).items() if name not in ("kind", "json", "command")}
    ledger = Ledger(args.kind, arguments, describe_machine(), measure())
    print(markdown_table([("", ledger)]), end="")
    if args.json is not None:
        write_ledger(args.json, ledger)
        print(f"ledger: {args.json}", file=sys.stderr)
    return 0


def _show(args: argparse.Namespace) -> int:
    ledgers = [(path.stem, read_ledger(path)) for path in args.ledgers]
    if args.kind == "table":
        print(markdown_table(ledgers), end="")
        return 0
    if args.output.suffix not in (".png", ".svg"):
        raise CourseError(f"--output {args.output}: name a file that ends in .png or .svg")
    from course_lib.bench.plot import plot_ledgers

    plot_ledgers(ledgers, args.output)
    print(f"picture: {args.output}", file=sys.stderr)
    return 0


# ---- one function per kind: checks what argparse cannot, returns what measures. ValueError: refused -------------


def _latency(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.latency import measure_latency

    if args.output_len < 2:
        raise ValueError("--output-len 1 leaves no gap between tokens to measure: ask for at least 2")
    return partial(
        measure_latency, _engine(args), input_len=args.input_len, output_len=args.output_len, repeats=args.repeats
    )


def _throughput(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.throughput import measure_throughput

    return partial(
        measure_throughput, _engine(args), _workload(args), repeats=args.repeats, peer=args.peer
    )


def _serving(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.serve_sim import measure_serving

    return partial(measure_serving, _engine(args), rate=args.rate, num_prompts=args.num_prompts, repeats=args.repeats)


def _prefix_caching(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.prefix_caching import measure_prefix_caching

    if args.num_prompts < 5:
        raise ValueError("--num-prompts: four of five prompts share their beginning; ask for at least 5")
    return partial(
        measure_prefix_caching, _engine(args), num_prompts=args.num_prompts, output_len=args.output_len,
        repeats=args.repeats,
    )  # fmt: skip


def _kernels(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.kernels import measure_kernels

    return partial(measure_kernels, args.device, args.dtype, repeats=args.repeats)


def _steps(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.steps import measure_step_rows

    return partial(
        measure_step_rows, _engine(args), args.num_running, num_steps=args.num_steps, repeats=args.repeats
    )


def _ladder(args: argparse.Namespace) -> Callable[[], list[Row]]:
    from course_lib.bench.ladder import measure_ladder

    return partial(
        measure_ladder, _engine(args), args.workload, num_prompts=args.num_prompts, peer_output=args.peer_output,
        cell_seconds=args.cell_seconds, repeats=args.repeats,
    )  # fmt: skip


def _compare(args: argparse.Namespace) -> Callable[[], list[Row]]:
    return partial(
        measure_compare, args.model, args.peer, dtypes=args.dtype, peer_dtypes=args.peer_dtype,
        workloads=args.workload, num_prompts=args.num_prompts, threads=args.threads, repeats=args.repeats,
    )  # fmt: skip


_MEASURES = {
    "latency": _latency, "throughput": _throughput, "serve-sim": _serving, "prefix-caching": _prefix_caching,
    "kernels": _kernels, "steps": _steps, "ladder": _ladder, "compare": _compare,
}  # fmt: skip


def _workload(args: argparse.Namespace) -> Callable[[int], list[WorkItem]]:
    """From a vocabulary's size to the items. Raises ValueError for an option that the workload does not have."""
    shape: dict[str, Any] = {}
    for name in ("num_prompts", "input_len", "output_len", "longest_output"):
        value = getattr(args, name)
        if value is None:
            continue
        if name not in _SHAPES[args.workload]:
            takes = ", ".join(f"--{option.replace('_', '-')}" for option in _SHAPES[args.workload])
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} has no meaning for --workload {args.workload}: it takes {takes}")
        shape[name] = value
    if "input_len" in shape:
        shortest, longest = shape["input_len"]
        if shortest > longest:
            raise ValueError("--input-len takes the shortest length first, then the longest")
        if args.workload == "single" and shortest != longest:
            raise ValueError(f"--workload single has one prompt: give --input-len {longest} {longest}")
        shape["input_len"] = longest if args.workload == "single" else (shortest, longest)
    return partial(WORKLOADS[args.workload], **shape)


def _engine(args: argparse.Namespace) -> Any:
    from course_lib.bench.engine_side import EngineOptions

    names = ("model", "dtype", "device", "max_model_len", "max_num_seqs", "enforce_eager")
    return EngineOptions(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def _positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value
