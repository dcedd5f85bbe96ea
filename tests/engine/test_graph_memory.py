"""The memory of CUDA graphs is part of what `gpu_memory_utilization` permits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from course_lib import LLM
from course_lib.runner import cache_size
from course_lib.runner.step_graphs import graph_bytes

MIB = 1 << 20


def test_further_graphs_of_a_pool_cost_what_the_second_did() -> None:
    assert graph_bytes([100 * MIB, 3 * MIB], 10) == 127 * MIB
    assert graph_bytes([100 * MIB], 1) == 100 * MIB
    assert graph_bytes([0, 0], 5) == 4 * MIB, "the driver's granularity hides small graphs"
    assert graph_bytes([-2 * MIB, -2 * MIB], 3) == 2 * MIB, "somebody else gave memory back meanwhile"


def test_the_cache_gets_what_weights_activations_graphs_and_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 MiB, of which we may have 900: 50 belong to others, 300 are our peak, 120 will be graphs."""
    seen = []
    fakes = {
        "reset_peak_memory_stats": lambda: None,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (600 * MIB, 1000 * MIB),  # after the step: 350 reserved by us, 50 by others
        "memory_reserved": lambda: 350 * MIB,
        "max_memory_allocated": lambda: 300 * MIB,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cache_size, "_run_largest_step", lambda runner: seen.append("step"))
    config = SimpleNamespace(cache=SimpleNamespace(gpu_memory_utilization=0.9))

    def graph_memory() -> int:
        assert seen == ["step"], "graphs are measured on the throw-away cache of the largest step"
        return 120 * MIB

    runner = SimpleNamespace(config=config, graph_memory=graph_memory)
    assert cache_size._free_cuda_memory(runner) == 430 * MIB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_engine_stays_within_its_share_of_the_device(tiny_model_path: Path) -> None:
    """A cache as large as the share permits, and then the graphs: together no more than was asked for."""
    torch.cuda.empty_cache()
    free_before, total = torch.cuda.mem_get_info()
    utilization = (total - free_before) / total + 0.05
    larger = {"num_hidden_layers": 16, "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 8192}
    llm = LLM(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cuda", dtype="float32", load_format="dummy",
        hf_overrides=larger, max_num_seqs=64, max_num_batched_tokens=2048, gpu_memory_utilization=utilization,
    )  # fmt: skip
    torch.cuda.synchronize()
    free, _ = torch.cuda.mem_get_info()
    config, cache = llm.llm_engine.config, llm.llm_engine.core.num_blocks * 16
    assert 0 < cache < 64 * 8192, "the share, not the number of seats, must have set the size"
    print(f"asked {utilization * total / MIB:.0f} MiB, taken {(total - free) / MIB:.0f}, "
          f"cache {cache * config.model.kv_bytes_per_token / MIB:.0f}")  # fmt: skip
    assert total - free <= utilization * total + 32 * MIB
