"""Which build of PyTorch to install on Linux.

The package index's build for Linux brings several gigabytes of CUDA libraries. Without an NVIDIA
GPU they are dead weight, so PyTorch's own index of CPU builds is asked for a few seconds, and used if
it has the pinned version. Invariant: an answer within `PROBE_S`, whatever the network does; the
question is put by a child process, because a name lookup cannot be interrupted in a thread.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from course_lib.bootstrap.places import REQUIREMENTS, child_environment

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_S = 6.0

# run by the child: is there a CPU wheel of this version for this Python?
_PROBE = """
import ssl, sys, urllib.request
url, version, tag, cafile, timeout = sys.argv[1:]
context = ssl.create_default_context(cafile=cafile or None)
with urllib.request.urlopen(url, timeout=float(timeout), context=context) as page:
    text = page.read(8_000_000).decode().replace("%2B", "+")
sys.exit(0 if f"torch-{version}+cpu-{tag}-{tag}-" in text else 1)
"""


def pinned_torch(requirements: Path = REQUIREMENTS) -> str:
    """The version of torch that `requirements.txt` asks for, e.g. "2.13.0"."""
    found = re.search(r"^torch==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"{requirements} pins no torch version: it needs a line `torch==X.Y.Z`")
    return found.group(1)


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver is here (looks, loads nothing)."""
    driver_files = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")
    return any(os.path.exists(path) for path in driver_files) or shutil.which("nvidia-smi") is not None


def cpu_index_answers(url: str = CPU_INDEX, limit_s: float = PROBE_S) -> bool:
    """Whether PyTorch's index of CPU builds can be reached and has the pinned version."""
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    # the certificates pip was told to trust (company proxies), if any
    cafile = next(
        (os.environ[name] for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE") if os.environ.get(name)), ""
    )
    command = [
        sys.executable,
        "-I",
        "-c",
        _PROBE,
        f"{url}/torch/",
        pinned_torch(),
        tag,
        cafile,
        str(limit_s / 2),
    ]
    try:
        answer = subprocess.run(
            command,
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=child_environment(),
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return answer.returncode == 0


def torch_arguments(say=print) -> list[str]:
    """Extra arguments for `pip install`: the CPU index where it helps and answers, else none."""
    if not sys.platform.startswith("linux"):
        return []  # the builds for macOS are small
    if has_nvidia_gpu():
        say("  NVIDIA GPU found: installing PyTorch with CUDA")
        return []
    if os.environ.get("PIP_NO_INDEX", "").lower() not in ("", "0", "false", "no", "off"):
        return []  # the user has told pip to ask no index
    if cpu_index_answers():
        say("  no NVIDIA GPU: installing PyTorch's CPU build")
        return ["--extra-index-url", CPU_INDEX]
    say(
        "  no NVIDIA GPU, but PyTorch's index of CPU builds does not answer: taking the build your package"
        " index has"
    )
    return []
