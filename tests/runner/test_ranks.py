"""What a runner does for one rank of several: its part of the cache, its place in the pipeline."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from course_lib.config import EngineConfig
from course_lib.engine_args import EngineArgs
from course_lib.models.causal_lm import IntermediateTensors
from course_lib.parallel.group import SoloGroup
from course_lib.parallel.layout import ParallelLayout
from course_lib.parallel.torch_group import TorchGroup
from course_lib.runner import cache_size
from course_lib.runner.input_batch import InputBatch, RequestState
from course_lib.runner.model_runner import ModelRunner
from course_lib.runner.pipeline_stage import PipelineStage
from course_lib.sampling_params import SamplingParams

HIDDEN = 6


@pytest.fixture(scope="module")
def config(course_model_path: Path) -> EngineConfig:
    args = EngineArgs(model=str(course_model_path), device="cpu", dtype="float32", max_model_len=512)
    return args.create_engine_config()


def on_ranks(config: EngineConfig, layout: ParallelLayout, **cache: int | None) -> EngineConfig:
    return replace(config, parallel=replace(config.parallel, layout=layout), cache=replace(config.cache, **cache))


@pytest.mark.parametrize(
    ("layout", "heads", "layers"),
    [
        (ParallelLayout(), 3, 30),
        (ParallelLayout(tensor=3), 1, 30),
        (ParallelLayout(tensor=9), 1, 30),  # three ranks hold the same KV head
        (ParallelLayout(pipeline=2), 3, 15),
        (ParallelLayout(tensor=3, pipeline=4), 1, 8),  # 8, 8, 7 and 7 layers: what counts is the rank with most
    ],
)
def test_each_rank_caches_its_own_heads_and_layers(
    config: EngineConfig, layout: ParallelLayout, heads: int, layers: int
) -> None:
    assert config.model.kv_heads_per_rank(layout) == heads
    assert config.model.kv_bytes_per_token_per_rank(layout) == 2 * layers * heads * 64 * 4
    there = on_ranks(config, layout, memory_bytes=64 << 20)
    blocks = cache_size.decide_num_blocks(ModelRunner(there))
    assert blocks == (64 << 20) // (2 * layers * heads * 64 * 4 * 16)


def test_ranks_share_the_memory_of_a_cpu(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the cache on each of n ranks, n-th parts of the memory: as many blocks as one process would have."""
    monkeypatch.setattr(cache_size, "_cpu_share", lambda: 60 << 20)
    alone = cache_size.decide_num_blocks(ModelRunner(on_ranks(config, ParallelLayout())))
    for layout in (ParallelLayout(tensor=3), ParallelLayout(pipeline=2), ParallelLayout(tensor=3, pipeline=5)):
        assert cache_size.decide_num_blocks(ModelRunner(on_ranks(config, layout))) == alone


def test_tokens_that_another_runner_sampled_move_with_their_row() -> None:
    batch = InputBatch(max_num_seqs=2, max_model_len=8, block_size=4)
    for name in "ab":
        batch.add(RequestState(name, SamplingParams(), [1, 2]), [0], 0)
    batch.write_tokens(1, 2, [7])
    batch.write_tokens(1, 3, [8, 9])
    batch.write_tokens(1, 4, [])
    batch.remove("a")
    assert batch.num_tokens[0] == 5 and batch.token_ids[0, :5].tolist() == [1, 2, 7, 8, 9]


def tensors(step: int, num_tokens: int) -> IntermediateTensors:
    hidden = torch.full((num_tokens, HIDDEN), float(step))
    return IntermediateTensors(hidden, -hidden)


def test_a_stage_hands_on_steps_that_the_next_one_is_not_ready_for() -> None:
    """Over gloo: both messages have been sent before anybody receives one, and arrive in order."""
    store, device = dist.HashStore(), torch.device("cpu")
    stages: dict[int, PipelineStage] = {}
    groups: dict[int, TorchGroup] = {}

    def join(rank: int) -> None:
        groups[rank] = TorchGroup(store, rank, 2, device, time_limit_s=20)
        stages[rank] = PipelineStage(groups[rank], HIDDEN, torch.float32)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step, num_tokens in enumerate((5, 1000)):
        stages[0].send(tensors(step, num_tokens))
    for step, num_tokens in enumerate((5, 1000)):
        received, sent = stages[1].receive(num_tokens), tensors(step, num_tokens)
        assert torch.equal(received.hidden, sent.hidden) and torch.equal(received.residual, sent.residual)
    assert groups[0].traffic.sent_calls == 2 and groups[0].traffic.sent_bytes == 2 * 1005 * HIDDEN * 4
    for group in groups.values():
        group.close()


class PatientGroup(SoloGroup):
    """Writes down which messages are waited for."""

    rank, size = 0, 3

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[torch.Tensor] = []
        self.waited_for: list[int] = []

    def isend(self, tensor: torch.Tensor, to: int) -> Waiting:
        assert to == 1
        self.sent.append(tensor)
        return Waiting(self, len(self.sent) - 1)


class Waiting:
    def __init__(self, group: PatientGroup, number: int) -> None:
        self.group, self.number = group, number

    def wait(self) -> None:
        self.group.waited_for.append(self.number)


def test_a_stage_waits_only_for_messages_older_than_all_steps_in_flight() -> None:
    group = PatientGroup()
    stage = PipelineStage(group, HIDDEN, torch.float32)
    kept = tensors(0, 2)
    stage.send(kept)
    kept.hidden.fill_(9)  # the model goes on in its buffers
    assert group.sent[0][0].eq(0).all()
    for step in range(1, 5):
        stage.send(tensors(step, 2))
    assert group.waited_for == [0, 1]

