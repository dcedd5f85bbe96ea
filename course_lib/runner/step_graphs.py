"""CUDA graphs of whole steps: one launch from the host instead of some hundreds.

A graph replays the very same kernels on the very same addresses, so a step is captured once per size and reads
its inputs from buffers that stay where they are (`device_inputs`). A step is padded to the next size; padding has
length 0 and slot -1, so it reads nothing and writes nothing.

Invariant: a replay does what the captured function does when called, on the buffers' present contents. What a
replay returned is valid until the next one.

vLLM: `vllm/v1/cudagraph_dispatcher.py`, `vllm/compilation/cuda_graph.py`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch

# Its sizes, ascending, and what computes a step of one of them and returns the logits.
CapturedStep = tuple[list[int], Callable[[int], torch.Tensor]]
_LEAST_GRAPH = 1 << 20  # bytes


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes, ascending; the last one is `max_num_seqs`. Steps grow, so padding stays near 10 %."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_sizes(max_num_batched_tokens: int) -> list[int]:
    """Padded numbers of tokens of steps that compute prompts, ascending; each half as much again, or twice."""
    sizes = [16, 32, 64, 128, 192, 256]
    while sizes[-1] < max_num_batched_tokens:
        sizes.append(sizes[-2] * 2)
    return [size for size in sizes if size < max_num_batched_tokens] + [max_num_batched_tokens]


class StepGraphs:
    """Captures `run(size)` for every size at construction.

    Args:
        sizes: ascending.
        run: computes a step of `size` from buffers at fixed addresses and returns the logits.
        pool: where the graphs keep their memory; may be shared by graphs that are replayed one after another.
    """

    def __init__(self, sizes: list[int], run: Callable[[int], torch.Tensor], pool: tuple[int, int]) -> None:
        self.sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for size in reversed(sizes):  # the largest first: the others fit into its memory
                run(size)  # compiles kernels and creates handles, which a capture may not
                stream.synchronize()
                # torch.cuda.graph() collects garbage at every entry, which takes longer than the capture.
                graph = torch.cuda.CUDAGraph()
                # NCCL's watchdog thread queries events meanwhile, which the default mode would take for a mistake.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                logits = run(size)
                graph.capture_end()
                self._graphs[size] = graph, logits
        torch.cuda.current_stream().wait_stream(stream)

    def size_for(self, count: int) -> int:
        """The smallest captured size that holds `count`."""
        return self.sizes[bisect.bisect_left(self.sizes, count)]

    def replay(self, size: int) -> torch.Tensor:
        """Run the step of `size`; returns its logits."""
        graph, logits = self._graphs[size]
        graph.replay()
        return logits


def capture(steps: list[CapturedStep], device: torch.device) -> list[StepGraphs]:
    """Graphs of every size of every kind of step, in one pool."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        graphs = [StepGraphs(sizes, run, pool) for sizes, run in steps]
        torch.cuda.empty_cache()  # what the steps before each capture took
    return graphs


def measure_capture(steps: list[CapturedStep], device: torch.device) -> int:
    """Bytes that `capture` will take, so that the cache can be sized before its addresses are known to any graph:
    from the two largest graphs of each kind, which are dropped again.

    vLLM: `profile_cudagraph_memory` in `vllm/v1/worker/gpu_model_runner.py`.
    """
    total, kept = 0, []
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        free = _free_memory()
        for sizes, run in steps:
            samples = []
            for size in sizes[:-3:-1]:
                kept.append(StepGraphs([size], run, pool))
                before, free = free, _free_memory()
                samples.append(before - free)
            total += graph_bytes(samples, len(sizes))
        kept.clear()
        torch.cuda.empty_cache()
    return total


def graph_bytes(samples: list[int], count: int) -> int:
    """Bytes of `count` graphs of one kind, from what the largest and the second largest took.

    They share a pool, so the first pays for the step's tensors and each further one for itself; never less than
    `_LEAST_GRAPH`, since the driver hands out memory in pieces that hide a small graph.
    """
    return max(0, samples[0]) + (count - 1) * max([_LEAST_GRAPH, *samples[1:]])


def _free_memory() -> int:
    """Bytes free on the current device once everything queued is done and nothing is kept for reuse."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
