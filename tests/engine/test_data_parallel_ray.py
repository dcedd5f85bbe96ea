"""Replicas in Ray actors, in a Ray on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from course_lib import LLM, SamplingParams
from course_lib.errors import EngineDeadError


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from course_lib.entrypoints.ray_local import start_local_ray

    start_local_ray(2)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray's own settings
def test_replicas_in_actors_and_the_death_of_one(local_ray: Any, tiny_model_path: Path) -> None:
    settings = {"model": str(tiny_model_path), "skip_tokenizer_init": True, "device": "cpu", "block_size": 4,
                "num_gpu_blocks_override": 64, "max_num_seqs": 4}  # fmt: skip
    prompts = [{"prompt_token_ids": [3 + i, 4, 5]} for i in range(20)]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=20 + i, ignore_eos=True) for i in range(20)]

    def answer(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = answer(LLM(**settings))
    with pytest.raises(ValueError, match="3 replicas need 1 CPU each, and Ray has 2"):
        LLM(data_parallel_size=3, data_parallel_backend="ray", **settings)
    llm = LLM(data_parallel_size=2, data_parallel_backend="ray", **settings)
    core = llm.llm_engine.core
    assert answer(llm) == expected and core.balancer.num_assigned == [10, 10]
    assert llm.reset_prefix_cache() and len(llm.collective_rpc("reset")) == 2
    pids = [int(link.name.split()[1]) for link in core.replicas.links.values()]

    step, killed = core.step, []

    def kill_meanwhile() -> list:
        news = step()
        if not killed and core.balancer.loads[1] < 10:
            os.kill(pids[1], signal.SIGKILL)
            killed.append(pids[1])
        return news

    core.step = kill_meanwhile
    assert answer(llm) == expected and killed
    assert core.balancer.loads == {0: 0}
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"no replica is left: replica 1 \(process \d+ on .*\) has ended \("):
        answer(llm)
