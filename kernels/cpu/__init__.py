"""The kernels in C++ for a CPU: `*.cpp` the sources, `build` compiles them, `ops` is what was compiled."""

from __future__ import annotations

import functools
import os
from types import ModuleType


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """`kernels.cpu.ops`; None if they were not compiled here, or `COURSE_CPU_KERNELS=off` is in the environment."""
    if os.environ.get("COURSE_CPU_KERNELS") == "off":
        return None
    try:
        import kernels.cpu.ops
    except (ImportError, OSError):  # never compiled; or for a torch that has changed since
        return None
    return kernels.cpu.ops
