"""Where a layer's small operations run: in fused kernels, Triton's on a GPU and C++ on a CPU, or in plain torch.

A layer of a small model is mostly launches and trips to memory, so a norm with its addition, an activation with its
product, a rotation with the cache write are one kernel each. Plain torch serves where there are none: no Triton, no
compiler, float16 on a CPU, `COURSE_CPU_KERNELS=off` in the environment. Invariant: a layer computes the same function
either way, up to rounding. vLLM: `vllm/model_executor/custom_op.py` chooses like this.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from kernels.cpu import compiled_kernels

_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused_kernels(x: torch.Tensor) -> ModuleType | None:
    """The kernels for small operations on x, if there are any."""
    if x.is_cpu:
        kernels = compiled_kernels()
        return kernels if kernels is not None and x.dtype in kernels.DTYPES and x.is_contiguous() else None
    return gpu_kernels(x)


def gpu_kernels(x: torch.Tensor) -> ModuleType | None:
    """`kernels.triton` if it is to be used for x, else None."""
    return _triton() if x.is_cuda and x.dtype in _GPU_DTYPES else None


def packing_kernels(dtype: torch.dtype) -> ModuleType | None:
    """`kernels.cpu.ops` if it has products with packed weights on this CPU for x of this dtype."""
    kernels = compiled_kernels()
    if kernels is None:
        return None
    packs = {torch.bfloat16: kernels.PACKS_BFLOAT16, torch.float32: kernels.PACKS_FLOAT32}
    return kernels if packs.get(dtype) else None


def linear_kernels(x: torch.Tensor, weight: torch.Tensor) -> ModuleType | None:
    """`kernels.triton` if its product of a few rows is the fastest for x W^T: one to four rows, a matrix that is
    neither long in its rows nor a language-model head, 16-bit numbers."""
    if not x.is_cuda or x.shape[0] > 4 or x.dtype == torch.float32 or max(weight.shape) > 4096:
        return None
    return gpu_kernels(x)


@functools.cache
def _triton() -> ModuleType | None:
    try:
        import kernels.triton
    except ImportError:  # no wheel for this system
        return None
    return kernels.triton
