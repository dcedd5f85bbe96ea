"""What a machine can do at most, measured: bytes copied and operations multiplied per second. And how a call is timed.

Bandwidth counts bytes read plus bytes written, so it compares with the bytes that a kernel must move.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # far beyond any cache
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
_LEAST_SECONDS = 0.02  # of one value measured by the wall clock


def copy_bandwidth(device: torch.device, repeats: int) -> list[float]:
    """GB/s of a large copy within the device's memory. Not from a CUDA graph, whose copies are slower (on an H100 2.4
    instead of 3.0 TB/s)."""
    count = _COPY_BYTES[device.type] // 2
    source = torch.randint(-99, 99, (count,), dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    return [4 * count / s / 1e9 for s in wall_seconds_per_call(lambda: target.copy_(source), repeats)]


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int) -> list[float]:
    """TFLOP/s of a large square product of random numbers, x W^T as in a linear layer."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return [2 * size**3 / s / 1e12 for s in seconds_per_call(lambda: a @ b.t(), device, repeats)]


def seconds_per_call(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of one call, once per repeat, after a warm-up.

    On a GPU the calls of a repeat are replayed from one CUDA graph: the time is the device's, without launches.
    `function` must not wait for the device; for one that does there is `wall_seconds_per_call`.
    """
    return (_graph_seconds if device.type == "cuda" else wall_seconds_per_call)(function, repeats)


def wall_seconds_per_call(function: Callable[[], object], repeats: int) -> list[float]:
    """As `seconds_per_call`, by the clock on the wall, launches included."""
    function()
    calls = 1
    while (taken := _wall_seconds(function, calls)) < _LEAST_SECONDS:
        calls = max(2 * calls, int(1.2 * calls * _LEAST_SECONDS / max(taken, 1e-9)))
    return [_wall_seconds(function, calls) / calls for _ in range(repeats)]


def _wall_seconds(function: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _graph_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles kernels and creates handles, which a capture may not
        start.record()
        for _ in range(5):
            function()
        end.record()
        end.synchronize()
        calls = max(1, min(200, int(4.0 / max(start.elapsed_time(end) / 5, 1e-3))))  # about 4 ms a replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
        graph.replay()
        seconds = []
        for _ in range(repeats):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3 / calls)
    torch.cuda.current_stream().wait_stream(stream)
    return seconds
