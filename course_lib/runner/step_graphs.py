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
                graph.capture_begin(pool=pool)
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
