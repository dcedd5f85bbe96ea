"""The benchmarks run, on a tiny random model, and report what they should."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch

from course_lib import LLM
from course_lib.bench import rungs
from course_lib.bench.cli import add_bench_arguments, run_bench
from course_lib.bench.engine_side import EngineOptions, check_fits, run_items
from course_lib.bench.ladder import measure_ladder
from course_lib.bench.latency import measure_latency
from course_lib.bench.prefix_caching import measure_prefix_caching
from course_lib.bench.serve_sim import measure_serving, percentile
from course_lib.bench.step_split import PHASES, split_steps
from course_lib.bench.steps import measure_step_rows
from course_lib.bench.throughput import measure_throughput
from course_lib.bench.traffic import weight_bytes
from course_lib.bench.workloads import uniform
from course_lib.errors import CourseError


@pytest.fixture
def options(tiny_text_model: Path) -> EngineOptions:
    return EngineOptions(model=str(tiny_text_model), device="cpu", max_model_len=512, max_num_seqs=8)


def _parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return parser.parse_args(arguments)


def test_latency(options: EngineOptions) -> None:
    ttft, tpot, rate = measure_latency(options, input_len=5, output_len=6, repeats=2)
    assert (ttft.name, tpot.name, rate.name) == ("TTFT", "TPOT", "output rate")
    for seconds_first, seconds_each, per_second in zip(ttft.values, tpot.values, rate.values, strict=True):
        assert 6 / per_second == pytest.approx((seconds_first + 5 * seconds_each) / 1e3)
    assert rate.details["split_steps"] == 6 and set(rate.details["split_ms_per_step"]) == set(PHASES)


@pytest.mark.parametrize("peer", ["transformers", "transformers-continuous"])
def test_throughput_beside_transformers(options: EngineOptions, peer: str) -> None:
    def items(vocab_size: int) -> list:
        return uniform(vocab_size, num_prompts=3, input_len=(3, 9), output_len=4)

    ours, theirs = measure_throughput(options, items, repeats=2, peer=peer)
    assert (ours.name, theirs.name) == ("course_lib", peer)
    assert len(ours.values) == len(theirs.values) == 2 and min(ours.values + theirs.values) > 0


def test_serving_reports_percentiles(options: EngineOptions) -> None:
    rows = measure_serving(options, rate=50.0, num_prompts=4, repeats=2)
    by_name = {(row.group, row.name): row for row in rows}
    assert {group for group, _ in by_name} == {"TTFT", "TPOT", "end-to-end", ""}
    for group in ("TTFT", "TPOT", "end-to-end"):
        values = [by_name[group, name].values[0] for name in ("p50", "p90", "p99")]
        assert 0 < values[0] <= values[1] <= values[2]
    assert by_name["TTFT", "p50"].median < by_name["end-to-end", "p50"].median
    assert by_name["", "output rate"].details["offered_tok_s"] > 0


def test_prefix_caching_is_compared_in_one_run(tiny_text_model: Path) -> None:
    """The tiny model has next to nothing to compute: what it shows is the hit rate, and that both sides are there."""
    options = EngineOptions(model=str(tiny_text_model), device="cpu", max_model_len=1024, max_num_seqs=8)
    rows = measure_prefix_caching(options, num_prompts=6, output_len=2, repeats=2)
    by_name = {(row.group, row.name): row for row in rows}
    for group in ("TTFT", "throughput"):
        fast, slow, better = (by_name[group, name].values for name in ("with caching", "without", "better"))
        if group == "TTFT":
            fast, slow = slow, fast
        assert better == [a / b for a, b in zip(fast, slow, strict=True)] and len(better) == 2 and min(better) > 0
    [computed] = by_name["hit rate", "computed"].values
    assert by_name["hit rate", "measured"].values == pytest.approx([computed] * 2, abs=1e-12) and computed > 40
    cost = by_name["nothing shared", "the cache's part of a step"]
    assert cost.median < 50 and set(cost.details["step_ms"]) == {"with caching", "without"}


def test_percentile() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, p) for p in (50, 90, 99, 100)] == [50, 90, 99, 100]
    assert percentile([3.0], 50) == 3.0 and percentile([1.0, 2.0], 50) == 1.0


def test_steps_without_the_model(options: EngineOptions) -> None:
    rows = measure_step_rows(options, [2, 8], num_steps=4, repeats=2)
    assert [(row.group, row.name) for row in rows] == [
        ("engine step without the model", "2"), ("engine step without the model", "8"),
        ("scheduler alone", "2"), ("scheduler alone", "8"),
    ]  # fmt: skip
    for row in rows:
        assert len(row.values) == 2 and 0 < row.median < 500
    split = rows[1].details["split_ms_per_step"]
    assert all(split[phase] > 0 for phase in ("schedule", "prepare", "sample", "detokenize"))
    assert split["forward"] < sum(split.values()) / 2, "the model is not to be in it"


def test_the_split_covers_the_step_and_leaves_no_trace(options: EngineOptions) -> None:
    llm = LLM(**options.arguments())
    items = uniform(1000, num_prompts=3, input_len=(3, 9), output_len=5)
    layer = llm.llm_engine.core.executor.runner.model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: time.sleep(0.01))  # so that the largest part is known
    before = [set(vars(owner)) for owner in _owners(llm)]
    with split_steps(llm.llm_engine) as split:
        seconds = run_items(llm, items)
    assert split.steps >= 5
    assert 0.5 * seconds < sum(split.seconds.values()) <= seconds
    assert split.seconds["forward"] == max(split.seconds.values())
    assert [set(vars(owner)) for owner in _owners(llm)] == before
    run_items(llm, items)


def _owners(llm: LLM) -> list[object]:
    engine = llm.llm_engine
    runner = engine.core.executor.runner
    return [engine, engine.core, engine.core.scheduler, runner, runner.model, engine.frontend.output_processor]


def test_weights_of_a_tied_model_count_once(options: EngineOptions) -> None:
    llm = LLM(**options.arguments())
    model = llm.llm_engine.core.executor.runner.model
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters()) > 24 * 49152 * 4


def test_a_rung_takes_parts_away_and_gives_them_back(options: EngineOptions) -> None:
    from course_lib.layers import activation, linear, norm

    llm = LLM(**options.arguments())
    runner = llm.llm_engine.core.executor.runner
    runner.graphs = "graphs"
    fused = norm.fused_kernels, activation.fused_kernels, linear.linear_kernels
    with rungs.only(llm, rungs.PAGED_KERNELS):
        assert runner.graphs is None and not runner.backend.fuses_rotary and runner.can_run_ahead is False
        assert norm.fused_kernels(None) is activation.fused_kernels(None) is linear.linear_kernels(None, None) is None
    with rungs.only(llm, rungs.GRAPHS):
        assert runner.graphs == "graphs" and norm.fused_kernels is fused[0] and "can_run_ahead" in vars(runner)
    assert runner.graphs == "graphs" and "can_run_ahead" not in vars(runner)
    assert (norm.fused_kernels, activation.fused_kernels, linear.linear_kernels) == fused


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_ladder_says_what_it_needs(options: EngineOptions) -> None:
    with pytest.raises(CourseError, match="needs an NVIDIA GPU"):
        measure_ladder(options, ["single"], num_prompts=None, peer_output=8, cell_seconds=1, repeats=1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["latency", "--output-len", "1"], "--output-len 1"),
        (["throughput", "--workload", "nanovllm", "--input-len", "3", "4"], "--input-len has no meaning"),
        (["prefix-caching", "--num-prompts", "4"], "at least 5"),
        (["throughput", "--longest-output", "9"], "--longest-output has no meaning for --workload uniform"),
        (["throughput", "--workload", "single", "--input-len", "3", "4"], "one prompt"),
    ],
)
def test_what_an_option_cannot_do_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(_parse(*arguments)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--rate", "0"], ["--rate", "nan"], ["--num-prompts", "-1"]])
def test_numbers_out_of_range_are_refused(option: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _parse("serve-sim", *option)


def test_a_workload_that_does_not_fit_says_what_to_raise(options: EngineOptions) -> None:
    with pytest.raises(CourseError, match="--max-model-len 512.*longest request has 700 tokens"):
        check_fits(uniform(1000, num_prompts=1, input_len=(600, 600), output_len=100), options)
