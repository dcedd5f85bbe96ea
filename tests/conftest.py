"""Shared by every test: thread counts that fit the machine, no hub, and the course model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before anything imports torch. A container may own fewer cores than torch would count, and more threads than
# cores, or than these small tensors have use for, make every test slower.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # that share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(4, _CORES // _WORKERS))))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command line does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
# Tests send Ctrl-C to processes that they start; a run in the background is given an ignored one to pass on.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def course_model_path() -> Path:
    """The folder of the converted course model; made once and kept in the cache."""
    from course_lib.model_store import COURSE_MODEL, resolve_model

    return resolve_model(COURSE_MODEL)
