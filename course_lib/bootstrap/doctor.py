"""`python3 -m course_lib doctor`: what is here, what is wrong, and how to put each thing right.

Runs on a bare Python; looks into the environment through a child process, so that it works when the
environment is missing or broken. It changes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from course_lib.bootstrap.environment import is_current
from course_lib.bootstrap.packages import GB
from course_lib.bootstrap.places import REPO_ROOT, REQUIREMENTS, child_environment, venv_folder, venv_python
from course_lib.bootstrap.process import usable_cores
from course_lib.bootstrap.torch_index import has_nvidia_gpu

PROBE_LIMIT_S = 120
SET_UP = "run `python3 -m course_lib test --quick` (any command sets up what is missing)"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is empty when nothing must be done."""

    topic: str
    text: str
    fix: str = ""


def run_doctor(more_checks: Iterable[Callable[[], Iterable[Finding]]] = ()) -> int:
    """Print every finding; status 1 if one of them needs fixing.

    more_checks: what the floors above know how to check (the model cache).
    """
    broken = 0
    for check in (check_machine, check_environment, *more_checks):
        for finding in check():
            print(f"{'FIX' if finding.fix else 'ok ':3}  {finding.topic:<13} {finding.text}", flush=True)
            if finding.fix:
                broken += 1
                print(f"     {'':<13} → {finding.fix}", flush=True)
    print("\nEverything is in order." if not broken else f"\n{broken} thing{'s' * (broken > 1)} to fix.")
    return 1 if broken else 0


def check_machine() -> Iterable[Finding]:
    yield Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("CPU", f"{usable_cores()} usable cores; {_vector_units() or 'vector units unknown'}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    little = memory < 3 * GB
    yield Finding(
        "memory",
        f"{memory / GB:.1f} GB",
        "the default run needs 1.6 GB: close other programs, or use a machine with 4 GB" if little else "",
    )
    free = shutil.disk_usage(REPO_ROOT).free
    yield Finding(
        "disk",
        f"{free / GB:.1f} GB free in {REPO_ROOT}",
        "the environment and the model take 3 GB: free some space" if free < GB else "",
    )


def check_environment() -> Iterable[Finding]:
    venv = venv_folder()
    python = Path(sys.executable) if venv is None else venv_python(venv)
    if venv is None:
        yield Finding("environment", f"COURSE_VENV=off: {python} as it is")
    elif not python.exists():
        yield Finding("environment", f"{venv} is missing", SET_UP)
        return
    elif not is_current(venv):
        yield Finding("environment", f"{venv} is unfinished or older than requirements.txt", SET_UP)
    else:
        yield Finding("environment", f"{venv} is up to date")
    facts, trouble = _probe(python)
    if facts is None:
        remedy = f"delete {venv} and {SET_UP}" if venv else "use another interpreter"
        yield Finding("python", f"{python} does not run: {trouble}", remedy)
        return
    yield Finding("python", f"{facts['python']} ({facts['executable']})")
    yield from _packages(facts, managed=venv is not None)
    yield from _devices(facts)


def _packages(facts: dict, managed: bool) -> Iterable[Finding]:
    pinned = dict(
        re.findall(r"^([A-Za-z_-]+)==([^\s;]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)
    )
    for name, version in facts["versions"].items():
        reinstall = SET_UP if managed else f"`{facts['executable']} -m pip install {name}`"
        wanted = pinned.get(name)
        if name in facts["import_errors"]:
            remedy = "delete .venv (or the folder in COURSE_VENV) and " + SET_UP if managed else reinstall
            yield Finding(name, f"{version} does not import: {facts['import_errors'][name]}", remedy)
        elif version is None and name == "triton" and not sys.platform.startswith("linux"):
            yield Finding(name, "not here: it has builds for Linux only; the torch backend serves instead")
        elif version is None:
            yield Finding(name, "missing", reinstall)
        elif managed and wanted and version.split("+")[0] != wanted:
            yield Finding(
                name, f"{version}, where requirements.txt has {wanted}", f"delete .venv and {SET_UP}"
            )
        else:
            yield Finding(
                name,
                version + (f" (requirements.txt has {wanted})" if version.split("+")[0] != wanted else ""),
            )


def _devices(facts: dict) -> Iterable[Finding]:
    if "threads" in facts:
        yield Finding("torch threads", f"{facts['threads']}, {facts['cpu_capability']} kernels")
        compiled = facts["cpu_kernels"]
        possible = not compiled and sys.platform.startswith("linux")
        remedy = f"install g++, then `{facts['executable']} -m kernels.cpu.build`" if possible else ""
        yield Finding("CPU kernels", compiled or "not compiled: torch's operations serve, and are slower", remedy)
    for device in facts["cuda_devices"]:
        yield Finding("CUDA device", device)
    if has_nvidia_gpu() and not facts["cuda_devices"] and "threads" in facts:
        build = f"built for CUDA {facts['cuda_build']}" if facts["cuda_build"] else "a CPU build"
        yield Finding(
            "CUDA device", f"an NVIDIA driver is here, but PyTorch ({build}) sees no device; the CPU serves"
        )
    elif not facts["cuda_devices"]:
        yield Finding("CUDA device", "none; the CPU serves")


def _probe(python: Path) -> tuple[dict | None, str]:
    """(facts, "") from the environment's interpreter, or (None, why not)."""
    script = Path(__file__).with_name("probe.py")
    try:
        answer = subprocess.run(
            [python, script], capture_output=True, text=True, timeout=PROBE_LIMIT_S, env=child_environment()
        )
        return json.loads(answer.stdout.splitlines()[-1]), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer in {PROBE_LIMIT_S} s"
    except (OSError, ValueError, IndexError) as error:
        return None, str(error)


def _vector_units() -> str:
    if platform.system() == "Darwin":
        return "NEON" if platform.machine() == "arm64" else ""
    try:
        flags = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    except OSError:
        return ""
    known = {
        "avx2": "AVX2",
        "avx512f": "AVX-512",
        "avx512_vnni": "AVX-512 VNNI",
        "avx512_bf16": "AVX-512 BF16",
        "avx512_fp16": "AVX-512 FP16",
        "amx_tile": "AMX",
        "asimd": "NEON",
        "sve": "SVE",
    }
    return ", ".join(name for flag, name in known.items() if flag in flags)
