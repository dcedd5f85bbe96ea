"""A Ray of one's own on one small machine: quick to start, quiet, gone after `ray.shutdown()`.

Owns the settings that `ray.init()` needs for that and no others. Plain `ray.init()` works as well; it
asks more of the machine and says more.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from course_lib import sampling_checks as check
from course_lib.errors import SetupError

_STORE_BYTES = 128 << 20  # shared memory for rows on their way; Ray takes at least 75 MiB
# The C++ side writes past Python's logging, into the notebook. Only the environment can tell it not to.
_LOG_LEVEL_VARIABLE = "RAY_BACKEND_LOG_LEVEL"
# Each of Ray's ten processes imports jsonschema, and that imports this if it can; Jupyter brings it along. It compiles
# a grammar for a second, more than half of such a process's start, to check a kind of address that Ray has not.
_SLOW_IMPORT = "rfc3987_syntax"
_ITS_STAND_IN = Path(__file__).with_name("ray_left_out")


def start_local_ray(num_cpus: int = 2, **init_kwargs: Any) -> None:
    """Start Ray on this machine, for this process; `ray.shutdown()`, or the end of the process, ends it.

    Nothing is reported to Ray's makers: `ray.init` itself switches that off.

    Args:
        num_cpus: tasks and actors side by side, which may be more than the machine has cores: one for each
            engine and one for the rest.
        init_kwargs: further arguments of `ray.init`; they win over the settings made here.

    Raises:
        RuntimeError: Ray runs already in this process, otherwise than asked for.
        SetupError: Ray's processes do not come up.
    """
    check.integer("num_cpus", num_cpus, low=1)
    with _slow_import_left_out():
        import ray
        import ray.data

    if ray.is_initialized():
        running = ray.cluster_resources().get("CPU", 0)
        if running == num_cpus and not init_kwargs:
            return  # a notebook's cell, run again
        raise RuntimeError(f"Ray runs already with {running:g} CPUs: use it so, or call ray.shutdown() first")
    settings = {
        "address": "local",  # never somebody else's cluster
        "num_cpus": num_cpus,
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "log_to_driver": False,  # what the workers print stays in their log files
        "logging_level": "ERROR",
    }
    settings.update(init_kwargs)
    with _native_side_quiet(), _slow_import_left_out():
        if not _init(settings) and not _init(settings):
            raise SetupError(
                "Ray's processes did not come up within 30 seconds, twice: the machine is too busy; close "
                "other programs and try again"
            )
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            # Plans and finished runs; and progress, which outside a terminal is a page of log lines.
            handler.setLevel(logging.WARNING)


def _init(settings: dict[str, Any]) -> bool:
    """Start Ray; False if its processes took longer than the 30 seconds that Ray gives them, as they may on
    a busy machine or the very first time. They are ended then: Ray leaves them behind."""
    import ray
    from psutil import NoSuchProcess, Process

    before = set(Process().children(recursive=True))
    try:
        ray.init(**settings)
    except Exception as error:
        for process in set(Process().children(recursive=True)) - before:
            with suppress(NoSuchProcess):
                process.kill()
        if "timed out during startup" in str(error):
            return False
        raise
    return True


@contextmanager
def _slow_import_left_out() -> Iterator[None]:
    """To this process inside the block, and for good to those started in it, `_SLOW_IMPORT` is not installed."""
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ITS_STAND_IN), paths)))
    hidden = _SLOW_IMPORT not in sys.modules
    if hidden:
        sys.modules[_SLOW_IMPORT] = None  # type: ignore[assignment]  # Python's way to say so
    try:
        yield
    finally:
        if hidden:
            del sys.modules[_SLOW_IMPORT]
        del os.environ["PYTHONPATH"]
        if paths is not None:
            os.environ["PYTHONPATH"] = paths


@contextmanager
def _native_side_quiet() -> Iterator[None]:
    """Silence the C++ side of the processes started inside, and of this one: what it writes to standard
    error itself (that it was told to be silent) is kept back, unless there is an exception."""
    mine = _LOG_LEVEL_VARIABLE not in os.environ
    os.environ.setdefault(_LOG_LEVEL_VARIABLE, "fatal")
    sys.stderr.flush()
    standard = os.dup(2)
    with tempfile.TemporaryFile() as aside:
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException:
            aside.seek(0)
            os.write(standard, aside.read())
            raise
        finally:
            os.dup2(standard, 2)
            os.close(standard)
            if mine:
                del os.environ[_LOG_LEVEL_VARIABLE]
