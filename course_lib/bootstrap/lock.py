"""One set-up at a time.

The lock belongs to the open file, not to a process id in it: the kernel drops it when the last
holder ends, however it ends, so there is no stale lock to clean up. The descriptor is handed to pip
as well, so a pip that outlives a killed parent still keeps others out.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from course_lib.errors import SetupError


@contextmanager
def exclusive_lock(path: Path, waiting_message: str) -> Iterator[int]:
    """Hold the lock file `path`; prints `waiting_message` if someone else has it, and waits.

    Yields the file descriptor, to be passed to child processes that must be covered too.
    Raises SetupError when the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise SetupError(
            f"{path.parent} cannot be written ({error.strerror}): make it yours, or choose another place "
            "with the environment variables COURSE_VENV (packages) and COURSE_CACHE (models)."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting_message, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks (some network homes): work without one
        yield descriptor
    finally:
        os.close(descriptor)
