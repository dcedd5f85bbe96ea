"""Run pip, with the user's own configuration of it, and say in one sentence what went wrong.

A person at a terminal sees pip's progress bars; a log file gets a line now and then. Either way the
whole run is in a log, which is read when pip fails.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from course_lib.bootstrap.places import child_environment
from course_lib.bootstrap.process import on_terminal, run
from course_lib.errors import CourseError, DiskSpaceError, DownloadError, SetupError

AGAIN = "then run the same command again, it carries on where it stopped"

_NO_SPACE = re.compile(r"No space left on device|Errno 28|Disk quota exceeded")
_NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|Failed to establish a new connection"
    r"|Temporary failure in name resolution|Connection (?:refused|reset|aborted)|Network is unreachable"
    r"|ProxyError|Max retries exceeded|IncompleteRead|IncompleteDownload|No route to host"
)
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|SSLError|SSLCertVerificationError")
_HASH = re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES|HashMismatch")
_NOT_THERE = re.compile(r"No matching distribution found for (\S+)")
_DENIED = re.compile(r"PermissionError: |Permission denied: |Read-only file system")


def run_pip(
    python: str,
    arguments: Sequence[str],
    *,
    log: Path,
    doing: str,
    lock_descriptor: int,
    progress: bool = True,
) -> None:
    """Run `python -m pip arguments`; raise DownloadError, DiskSpaceError or SetupError if it fails.

    doing: what it is for, e.g. "installing packages"; said while it works and when it fails.
    lock_descriptor: handed to pip, so that the lock lasts as long as pip does.
    """
    log.unlink(missing_ok=True)
    shown = progress and on_terminal()
    environment = child_environment(PIP_DISABLE_PIP_VERSION_CHECK="1")
    # the log has more than pip prints: why an index could not be read, for one
    command = [python, "-m", "pip", *arguments, "--log", str(log)]
    if shown:
        status = run(command, env=environment, pass_fds=(lock_descriptor,))
    else:
        status = run(
            [*command, "--progress-bar", "off"],
            env=environment,
            pass_fds=(lock_descriptor,),
            output=Path(os.devnull),
            heartbeat=doing if progress else None,
        )
    if status != 0:
        error = explain(log, status, doing)
        if not shown and isinstance(error, SetupError):  # the others say all there is to know
            print("".join(f"  pip: {line}\n" for line in _errors(log)), end="", flush=True)
        raise error


def _errors(log: Path) -> list[str]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # each line starts with the time and a space
    said = [line.partition(" ")[2] for line in lines]
    return [line for line in said if line.startswith("ERROR")] or said[-3:]


def explain(log: Path, status: int, doing: str) -> CourseError:
    """The error to raise after pip ended with `status`; `doing`: what it was to do."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if _NO_SPACE.search(text):
        return DiskSpaceError(
            f"The disk filled up while {doing}: free some space (pip also uses the folder for temporary "
            f"files, see TMPDIR), {AGAIN}."
        )
    if _HASH.search(text):
        return DownloadError(f"A package arrived damaged while {doing}: `pip cache purge`, {AGAIN}.")
    if _CERTIFICATE.search(text):
        return DownloadError(
            f"The package index's certificate was not accepted while {doing}: if a company proxy is in the "
            "way, "
            f"point PIP_CERT to its certificate file, {AGAIN}."
        )
    if _NO_NETWORK.search(text):
        return DownloadError(
            f"The Python package index could not be reached while {doing}: check the network connection (and "
            f"HTTPS_PROXY or pip's configuration, if you use them), {AGAIN}."
        )
    missing = _NOT_THERE.search(text)
    if missing:
        return DownloadError(
            f"The package index in use has no {missing.group(1)} for this Python and machine: check pip's "
            "configuration (`pip config list`), or use Python 3.11, 3.12 or 3.13 on Linux or Apple silicon."
        )
    if _DENIED.search(text):
        return SetupError(
            f"A file could not be written while {doing}: make the folders named above yours, {AGAIN}."
        )
    return SetupError(f"pip stopped with status {status} while {doing}; its own words are above.")
