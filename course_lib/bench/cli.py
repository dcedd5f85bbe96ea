"""`python3 -m course_lib bench …`: measure, print a table, write a ledger."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `bench`."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    throughput = kinds.add_parser("throughput", help="output tokens/s of many prompts at once")
    throughput.add_argument("--model", default=None, help="folder or model id (default: the course model)")
    throughput.add_argument("--dtype", default="auto")
    throughput.add_argument("--num-prompts", type=_positive_integer, default=64)
    throughput.add_argument(
        "--input-len", type=_positive_integer, nargs=2, default=(16, 64), metavar=("SHORTEST", "LONGEST"),
        help="prompt lengths, uniform in between (default 16 64)",
    )  # fmt: skip
    throughput.add_argument(
        "--output-len", type=_positive_integer, default=64, help="new tokens per prompt (default 64)"
    )
    throughput.add_argument("--repeats", type=_positive_integer, default=3)
    throughput.add_argument("--peer", choices=("transformers",), default=None, help="measure against it, in turn")
    steps = kinds.add_parser("steps", help="cost of the scheduler alone, per decode step")
    steps.add_argument("--num-running", type=_positive_integer, nargs="+", default=[64, 256, 1024])
    for kind in (throughput, steps):
        kind.add_argument("--json", type=Path, default=None, help="write the ledger to this file")


def run_bench(args: argparse.Namespace) -> int:
    """Measure one kind. Returns the exit status."""
    if args.kind == "throughput" and args.input_len[0] > args.input_len[1]:
        print("bench: --input-len takes the shortest length first, then the longest", file=sys.stderr)
        return 2
    results = _throughput(args) if args.kind == "throughput" else _steps(args)
    ledger = {"kind": args.kind, "arguments": _plain(vars(args)), "machine": describe_machine(), "results": results}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(ledger, indent=1) + "\n")
        print(f"ledger: {args.json}", file=sys.stderr)
    return 0


def _throughput(args: argparse.Namespace) -> dict[str, Any]:
    from course_lib.bench.throughput import measure_throughput

    rates = measure_throughput(
        model=args.model, dtype=args.dtype, num_prompts=args.num_prompts, input_len=tuple(args.input_len),
        output_len=args.output_len, repeats=args.repeats, peer=args.peer,
    )  # fmt: skip
    for side, values in rates.items():
        print(f"{side:<14} {_spread(values, 1, 'output tokens/s')}")
    if args.peer is not None:
        ratios = [ours / theirs for ours, theirs in zip(rates["course_lib"], rates[args.peer], strict=True)]
        print(f"{'ratio':<14} {_spread(ratios, 2, '')}")
    return rates


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    from course_lib.bench.steps import measure_steps

    results = {}
    for count in args.num_running:
        milliseconds = [1e3 * seconds for seconds in measure_steps(count)]
        results[str(count)] = milliseconds
        mean = statistics.fmean(milliseconds)
        print(f"{count:>5} running: {_spread(milliseconds, 3, 'ms a step')}, mean {mean:.3f}")
    return results


def describe_machine() -> dict[str, Any]:
    """What a figure depends on: the code, the processor, threads, versions."""
    import torch
    import transformers

    return {
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _positive_integer(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _git_commit() -> str | None:
    """The commit of this checkout, "-dirty" if tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _cpu_model() -> str | None:
    """The processor's name, if the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def _spread(values: list[float], digits: int, unit: str) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"median {middle:.{digits}f} (range {low:.{digits}f} to {high:.{digits}f}) {unit}".rstrip()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
