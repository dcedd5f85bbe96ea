"""`bench kernels`: the engine's kernels at the course model's shapes, beside what the machine can do."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from course_lib.bench.ceilings import copy_bandwidth, matmul_rate
from course_lib.bench.ledger import Row
from course_lib.errors import CourseError

# SmolLM2-135M
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 576, 1536, 30, 49152
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
BLOCK_SIZE = 16


def measure_kernels(device_name: str, dtype_names: list[str] | None, *, repeats: int) -> list[Row]:
    """Triton's kernels on a GPU; on a CPU the torch backend's attention and the linear layers.

    A row's limit is the copy bandwidth (GB/s) or the matmul rate (TFLOP/s, on a CPU GFLOP/s) measured first.
    Raises CourseError for "cuda" where there is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device_name == "cuda" and not has_gpu:
        raise CourseError("--device cuda: torch finds no CUDA device here; measure the CPU's kernels with --device cpu")
    device = torch.device("cuda" if has_gpu and device_name != "cpu" else "cpu")
    names = dtype_names or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16", "float16"])
    ceiling = Row("copy", "GB/s", copy_bandwidth(device, repeats), group="ceiling")
    rows = [ceiling]
    with torch.inference_mode():
        for name in tqdm(names, desc="kernels", leave=False):
            dtype = getattr(torch, name)
            rates, unit = matmul_rate(device, dtype, repeats), "TFLOP/s"
            if device.type == "cpu":
                rates, unit = [1e3 * rate for rate in rates], "GFLOP/s"
            product = Row(f"matmul {name}", unit, rates, group="ceiling")
            rows.append(product)
            rows += _cases(device, dtype, ceiling.median, product.median, repeats)
    return rows


def _cases(device: torch.device, dtype: torch.dtype, copy: float, product: float, repeats: int) -> list[Row]:
    if device.type == "cpu":
        from course_lib.bench.kernels_cpu import CpuKernels

        return CpuKernels(dtype, copy, product, repeats).rows()
    from course_lib.bench.kernels_gpu import GpuKernels

    return GpuKernels(device, dtype, copy, product, repeats).rows()
