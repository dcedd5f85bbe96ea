"""How many KV blocks fit.

On a GPU: run the largest step there can be, see how much memory it took at its peak, capture a few CUDA
graphs to see what all will take, and give what is left under `gpu_memory_utilization` to the cache. On a
CPU, memory belongs to everybody: take a quarter of what is free, at most 4 GiB, shared out among the ranks
of the engine; pages are only really taken when first used.

Each rank answers for itself, and its cache holds its own layers' and heads' part of a block. The engine takes the
smallest answer: a block has the same number on all ranks.

vLLM: `determine_available_memory` in `vllm/v1/worker/gpu_worker.py`, `check_enough_kv_cache_memory`
in `vllm/v1/core/kv_cache_utils.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from course_lib.core.messages import CachedRequestData, NewRequestData, SchedulerOutput
from course_lib.sampling_params import SamplingParams

if TYPE_CHECKING:
    from course_lib.runner.gpu_model_runner import GpuModelRunner
    from course_lib.runner.model_runner import ModelRunner

_CPU_FRACTION = 0.25
_CPU_MOST = 4 << 30
_CGROUPS = Path("/sys/fs/cgroup")
# A container's limit, its use, and which line of memory.stat is cache that the kernel gives back on demand.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        "total_inactive_file",
    ),
)  # fmt: skip


def decide_num_blocks(runner: ModelRunner) -> int:
    """Blocks for this runner's cache, from the configuration and the memory there is.

    All ranks of an engine must ask at the same time: on a GPU the largest step is one that they run together.
    """
    config = runner.config
    if config.cache.num_blocks_override is not None:
        return config.cache.num_blocks_override
    layout = config.parallel.layout
    block_bytes = config.model.kv_bytes_per_token_per_rank(layout) * config.cache.block_size
    memory = config.cache.memory_bytes
    if memory is None:
        memory = _free_cuda_memory(runner) if runner.device.type == "cuda" else _cpu_share() // layout.world_size
    # No request set can use more than this many, so a tiny model does not get a huge cache.
    limits = config.scheduler
    useful = limits.max_num_seqs * -(-limits.max_model_len // config.cache.block_size)
    return min(memory // block_bytes, useful)


def _cpu_share() -> int:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = "/proc/meminfo"
    if os.path.exists(meminfo):  # Linux knows what is free; elsewhere take the total as the measure
        with open(meminfo) as file:
            fields = dict(line.split(":", 1) for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    for room in _cgroup_rooms(_CGROUPS):
        available = min(available, room)
    return min(int(available * _CPU_FRACTION), _CPU_MOST)


def _cgroup_rooms(root: Path) -> list[int]:
    """Bytes that a container may still take, one entry per limit (cgroup v2 and v1); [] without limits."""
    rooms = []
    for limit_file, used_file, stat_file, reclaimable in _CGROUP_FILES:
        try:
            limit, used = ((root / name).read_text().strip() for name in (limit_file, used_file))
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except OSError:  # this version of cgroups is not in use here
            continue
        if limit != "max":
            rooms.append(max(0, int(limit) - int(used) + int(stat.get(reclaimable, 0))))
    return rooms


def _free_cuda_memory(runner: GpuModelRunner) -> int:
    """Bytes left for the cache beside the weights, the largest step's activations and the CUDA graphs."""
    torch.cuda.reset_peak_memory_stats()
    _run_largest_step(runner)
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    # What others hold on this device, plus our own peak.
    foreign = total - free - torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_allocated()
    graphs = runner.graph_memory()
    torch.cuda.empty_cache()
    return max(0, int(total * runner.config.cache.gpu_memory_utilization) - foreign - peak - graphs)


def _run_largest_step(runner: ModelRunner) -> None:
    """One step of `max_num_batched_tokens` over `max_num_seqs` prompts, on a throw-away cache."""
    limits = runner.config.scheduler
    size = runner.config.cache.block_size
    num_seqs = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    length = min(limits.max_num_batched_tokens // num_seqs, limits.max_model_len - 1)
    blocks_each = -(-length // size)
    runner.initialize_cache(num_seqs * blocks_each)
    params = SamplingParams(max_tokens=1)
    requests = [
        NewRequestData(
            str(i), [0] * length, [], params, list(range(i * blocks_each, (i + 1) * blocks_each)), 0
        )
        for i in range(num_seqs)
    ]
    counts = {request.request_id: length for request in requests}
    empty = CachedRequestData()
    runner.execute_model(SchedulerOutput(requests, empty, counts, length * num_seqs, set(), set()))
    runner.execute_model(SchedulerOutput([], empty, {}, 0, set(), set(counts)))
