"""Child processes that end when we end.

Invariant: `run` never returns or raises while its child is alive, so an interrupted set-up leaves
no pip behind that goes on writing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

HEARTBEAT_S = 20.0
PATIENCE_S = 2.0  # with a child that was interrupted together with us


def run(
    command: Sequence[str],
    *,
    env: dict[str, str] | None = None,
    pass_fds: tuple[int, ...] = (),
    output: Path | None = None,
    heartbeat: str | None = None,
) -> int:
    """Run a command and return its exit status.

    output: file for what it prints (None: our own standard streams).
    heartbeat: what to say every 20 seconds meanwhile (None: nothing).
    """
    started = time.monotonic()
    with ExitStack() as files:
        sink = files.enter_context(output.open("wb")) if output else None
        process = subprocess.Popen(
            list(command),
            env=env,
            pass_fds=pass_fds,
            stdout=sink,
            stderr=subprocess.STDOUT if output else None,
        )
    try:
        while True:
            try:
                return process.wait(timeout=HEARTBEAT_S if heartbeat else None)
            except subprocess.TimeoutExpired:
                print(f"  … {heartbeat} ({time.monotonic() - started:.0f} s)", flush=True)
    except BaseException:
        _stop(process)
        raise


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has, where it is confined to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_terminal() -> bool:
    """Whether a person is watching: progress bars are for them, not for log files."""
    return sys.stdout.isatty()


def raise_on_sigterm() -> None:
    """Make SIGTERM unwind the stack as Ctrl-C does, so that `run` can stop its child."""

    def unwind(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, unwind)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C in a terminal reaches the child too: give it a moment, then insist."""
    for ask, patience_s in (
        (lambda: None, PATIENCE_S),
        (lambda: process.send_signal(signal.SIGINT), 5.0),
        (process.terminate, 5.0),
        (process.kill, None),
    ):
        ask()
        try:
            process.wait(timeout=patience_s)
            return
        except subprocess.TimeoutExpired:
            continue
