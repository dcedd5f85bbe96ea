"""Under torchrun: one script, two ranks, an engine in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from course_lib import LLM
from tests.executor.requests import SAMPLED, tokens

SCRIPT = """
import dataclasses, json, os, pickle, sys
from pathlib import Path
from course_lib import LLMEngine
from course_lib.errors import RankDivergenceError
from course_lib.parallel.config import ParallelConfig
from course_lib.parallel.layout import ParallelLayout
from tests.executor.requests import SAMPLED, tokens

rank = int(os.environ["RANK"])
config = pickle.loads(Path(sys.argv[1]).read_bytes())

def make(blocks, batched_tokens):
    return LLMEngine(dataclasses.replace(
        config,
        parallel=ParallelConfig(ParallelLayout(2), "external_launcher", False),
        cache=dataclasses.replace(config.cache, num_blocks_override=blocks),
        scheduler=dataclasses.replace(config.scheduler, max_num_batched_tokens=batched_tokens),
    ))

def diverging(engine):
    try:
        tokens(engine, SAMPLED)
    except RankDivergenceError as error:
        return str(error)

engine = make(64 - rank, 256)
runner = engine.core.executor.runner
said = {"blocks": engine.core.num_blocks, "greedy": tokens(engine), "sampled": tokens(engine, SAMPLED),
        "traffic": runner.parallel.tensor.traffic.all_reduce_calls}
said["schedule"] = diverging(make(64, 16 - 8 * rank))  # beside the first one
runner.generator.manual_seed(rank)
said["seed"] = diverging(engine)
said["afterwards"] = tokens(engine)
Path(sys.argv[2], str(rank)).write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def ranks(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the two ranks have to say."""
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [*command, str(script), str(config_file), str(folder)], cwd=root, capture_output=True, text=True,
        timeout=240, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


def test_both_ranks_answer_as_one_process_does(
    ranks: list[dict], expected: list[list[int]], make_llm: Callable[..., LLM]
) -> None:
    assert [one["greedy"] for one in ranks] == [expected, expected]
    assert [one["afterwards"] for one in ranks] == [expected, expected]
    whole = make_llm()
    tokens(whole)
    assert [one["sampled"] for one in ranks] == [tokens(whole, SAMPLED)] * 2
    assert ranks[0]["traffic"] == ranks[1]["traffic"] > 0


def test_the_least_number_of_blocks_counts(ranks: list[dict]) -> None:
    assert [one["blocks"] for one in ranks] == [63, 63]


def test_a_rank_with_other_limits_is_named(ranks: list[dict]) -> None:
    """One may compute 16 tokens a step, the other 8."""
    assert ranks[0]["schedule"] == ranks[1]["schedule"]
    assert ranks[0]["schedule"].startswith(
        "rank 1 differs from rank 0 before step 1: rank 1 schedules for request 1#1 4 tokens, rank 0 5 tokens. Every"
    )


def test_a_rank_with_another_seed_is_named(ranks: list[dict]) -> None:
    assert ranks[0]["seed"] == ranks[1]["seed"]
    assert "rank 1 differs from rank 0 before step" in ranks[0]["seed"]
    assert ": rank 1 sampled in step" in ranks[0]["seed"]
