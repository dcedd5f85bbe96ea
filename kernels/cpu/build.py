"""Compile the CPU's kernels, once per machine: `python3 -m kernels.cpu.build`. The course's set-up does it.

The library lies where torch keeps compiled extensions (`TORCH_EXTENSIONS_DIR`, `~/.cache/torch_extensions`), in a
folder named after the sources, torch's version and the processor's vector instructions, so that a home directory that
several machines share holds one for each. Invariant: a library with its final name is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
NAME = "course_cpu"
# By what torch itself found out about the processor. Not `native`: a library may outlive the machine it was made on.
_INSTRUCTIONS = {
    "AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "AVX2": ["-march=x86-64-v3"],
}
# Vector instructions for the loops that ask for them, and for rounding and square roots; nothing that changes results.
_FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]


class CannotCompile(Exception):
    """There is no compiler, or it failed; the message says which, and what to do."""


def library_path() -> Path:
    """Where the library of these sources, torch and processor is, or would be."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "torch_extensions"
    capability = torch.backends.cpu.get_cpu_capability()
    sources = (source.read_text(encoding="utf-8") for source in SOURCES + HEADERS)
    key = "\0".join([*sources, torch.__version__, capability, *_FLAGS])
    return Path(root) / f"{NAME}_{hashlib.sha256(key.encode()).hexdigest()[:16]}" / f"{NAME}.so"


def compile_kernels() -> Path:
    """Compile unless that was done. Returns the library's path.

    Raises CannotCompile.
    """
    library = library_path()
    if library.exists():
        return library
    if not sys.platform.startswith("linux"):
        raise CannotCompile("they are compiled on Linux only")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise CannotCompile("there is no C++ compiler: on Debian or Ubuntu, `sudo apt install g++` brings one")
    from torch.utils.cpp_extension import load

    library.parent.mkdir(parents=True, exist_ok=True)
    # torch calls `ninja`, which may be in the environment but not on the path
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    flags = _FLAGS + _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            load(NAME, [*map(str, SOURCES)], extra_cflags=flags, extra_ldflags=["-fopenmp"], build_directory=folder,
                 is_python_module=False)  # fmt: skip
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise CannotCompile(f"the compiler failed, and said: {error}") from error
        os.replace(Path(folder) / library.name, library)
    return library


def main() -> int:
    """Compile, and say what came of it. Not an error if it is impossible: torch's operations serve as well."""
    print("  compiling the CPU kernels (once; half a minute)", flush=True)
    try:
        compile_kernels()
    except CannotCompile as error:
        print(f"  no CPU kernels: {error}. The engine uses torch's operations instead, and is slower.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
