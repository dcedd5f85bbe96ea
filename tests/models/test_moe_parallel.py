"""Experts on several ranks, cut up or dealt out: one rank's logits, a share of the weights, the counted traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from course_lib.layers.expert_exchange import GatheredTokens, make_exchange
from course_lib.models.loader import load_model
from course_lib.parallel.group import ParallelGroups, SoloGroup
from course_lib.parallel.layout import ParallelLayout, split_evenly
from tests.models.moe_models import CONFIGS, EXPERTS
from tests.models.test_models_parity import random_model, sequences
from tests.parallel.ranks import run_ranks

TOLERANCE = 1e-5  # logits have a standard deviation of about 1
NAMES = ("mixtral", "qwen2-moe", "granite-moe")
LAYERS, HIDDEN, BYTES = 3, 96, 4


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(name, groups) -> this rank's part of a random model that is saved once per name."""
    saved = {}

    def get(name, parallel: ParallelGroups | None = None, **arguments):
        if name not in saved:
            folder = tmp_path_factory.mktemp(name)
            random_model(CONFIGS[name]()).save_pretrained(folder)
            saved[name] = folder, transformers.AutoConfig.from_pretrained(folder)
        folder, config = saved[name]
        return load_model(folder, config, torch.float32, "cpu", max_model_len=64, parallel=parallel, **arguments)

    return get


def one_rank(load, name, paged_run, prompts, steps) -> list[torch.Tensor]:
    run = paged_run(load(name), prompts)
    return [logits for step in steps for logits in run.advance(step)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


# ---- the same tokens on all ranks -------------------------------------------------------------------

SHARED = [
    *((name, ParallelLayout(tensor=2), deal) for name in NAMES for deal in (False, True)),
    ("granite-moe", ParallelLayout(tensor=6), True),  # more ranks than experts: one has none
    ("mixtral", ParallelLayout(tensor=6), False),  # inner features: 19, 19, 19, 19, 18, 18
    ("qwen2-moe", ParallelLayout(tensor=2, pipeline=2), True),
]


def case_id(value: object) -> str | None:
    if isinstance(value, ParallelLayout):
        return f"dp{value.data}-pp{value.pipeline}-tp{value.tensor}"
    return {True: "dealt", False: "cut"}[value] if isinstance(value, bool) else None


@pytest.mark.parametrize("name, layout, deal", SHARED, ids=case_id)
def test_logits_equal_those_of_one_rank(name, layout, deal, load, paged_run):
    prompts, steps = sequences(11, 6), [[7, 5], [3, 0], [1, 1]]
    expected = one_rank(load, name, paged_run, prompts, steps)
    assert torch.cat(expected).std() > 0.3, "the random model says nothing"

    def work(parallel: ParallelGroups) -> list[torch.Tensor]:
        run = paged_run(load(name, parallel), prompts)
        return [logits for step in steps for logits in run.advance(step)]

    results = run_ranks(layout, work, deal_experts=deal)
    for rank, found in enumerate(results):
        if layout.coordinates(rank).pipeline == layout.pipeline - 1:
            assert_equal(found, expected)
            assert all(torch.equal(a, b) for a, b in zip(found, results[-1], strict=True)), "a bit differs"


# ---- other tokens on each replica -------------------------------------------------------------------

# Which prompts a replica computes, and how many tokens of each in every step; None: it has nothing to do.
REPLICAS = [
    (slice(0, 2), [[7, 5], [3, 0], [1, 1], None, [1, 1]]),
    (slice(2, 3), [[2], None, [3], None, None]),
    (slice(3, 4), [None, None, [9], None, [1]]),
    (slice(4, 5), [None, None, None, None, None]),
]
REPLICATED = [
    *((name, ParallelLayout(data=2)) for name in NAMES),
    ("mixtral", ParallelLayout(data=4)),
    ("qwen2-moe", ParallelLayout(data=2, tensor=2)),
    ("granite-moe", ParallelLayout(data=2, pipeline=2)),
    ("mixtral", ParallelLayout(data=3, tensor=2)),
]


@pytest.mark.parametrize("name, layout", REPLICATED, ids=case_id)
def test_replicas_with_unequal_and_no_tokens_equal_one_rank(name, layout, load, paged_run):
    prompts = sequences(13, 8, 6, 10, 4)
    plans = REPLICAS[: layout.data]
    expected = [
        one_rank(load, name, paged_run, prompts[own], [step for step in steps if step]) for own, steps in plans
    ]


    def work(parallel: ParallelGroups) -> tuple[int, list[torch.Tensor]]:
        replica = parallel.expert.rank // parallel.tensor.size
        own, steps = plans[replica]
        model = load(name, parallel)
        run = paged_run(model, prompts[own])
        found = []
        for step in steps:
            if step is None:
                model.forward_without_tokens()
            else:
                found += run.advance(step)
        return replica, found

    results = run_ranks(layout, work, deal_experts=True)
    for rank, (replica, found) in enumerate(results):
        if layout.coordinates(rank).pipeline == layout.pipeline - 1:
            assert_equal(found, expected[replica])


def test_tokens_go_there_and_back_in_any_numbers():
    """Without a model: each rank adds its own share of what is a sum; uneven, one, none, and nobody's tokens."""
    layout = ParallelLayout(data=3, tensor=2)
    rounds = [(4, 4, 4), (5, 1, 0), (0, 0, 7), (0, 0, 0), (1, 1, 1), (3, 2, 2)]

    def work(parallel: ParallelGroups) -> None:
        exchange = make_exchange(parallel)
        assert isinstance(exchange, GatheredTokens)
        replica, calls = parallel.expert.rank // 2, 0
        for counts in rounds:
            tokens = [torch.arange(count * 2.0).view(-1, 2) + 100 * i for i, count in enumerate(counts)]
            exchange.begin(counts[replica])
            for _ in range(2):  # layers
                seen = exchange.dispatch(tokens[replica])
                if any(counts):
                    assert torch.equal(seen, torch.cat(tokens)), "every token once, in order"
                own = tokens[replica] * (parallel.tensor.rank + 1)
                back = exchange.combine(seen * (parallel.expert.rank + 1), own)
                torch.testing.assert_close(back, tokens[replica] * (21 + 3))
            calls += 2 * any(counts)
        assert parallel.expert.traffic.gather_calls == 2 * calls

    run_ranks(layout, work, deal_experts=True)


# ---- shares and traffic -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, deal",
    [(ParallelLayout(tensor=2), False), (ParallelLayout(tensor=2), True), (ParallelLayout(data=4), True)],
    ids=case_id,
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_holds_its_share_of_the_experts_and_all_of_them_once(name, layout, deal, load):
    def expert_bytes(parallel: ParallelGroups | None = None) -> list[int]:
        model = load(name, parallel)
        return [sum(p.nbytes for p in mixture.experts.parameters()) for mixture in model.mixtures()]

    whole, shares = expert_bytes(), run_ranks(layout, expert_bytes, deal_experts=deal)
    assert [sum(column) for column in zip(*shares, strict=True)] == whole
    here = [len(part) for part in split_evenly(EXPERTS, layout.world_size)] if deal else [1] * layout.world_size
    for share, parts in zip(shares, here, strict=True):
        assert share == [size * parts // sum(here) for size in whole]


def test_absent_experts_are_not_read(load, monkeypatch):
    from course_lib.models import loader

    read = []
    original = loader.StoredTensor.__getitem__
    monkeypatch.setattr(loader.StoredTensor, "__getitem__",
                        lambda self, part: read.append(out := original(self, part)) or out)  # fmt: skip
    load("mixtral")
    whole = sum(tensor.nbytes for tensor in read)
    read.clear()
    silent = SoloGroup()
    silent.rank, silent.size = 3, 4
    model = load("mixtral", ParallelGroups(SoloGroup(), SoloGroup(), silent))
    experts = sum(p.nbytes for mixture in model.mixtures() for p in mixture.experts.parameters())
    assert whole - sum(tensor.nbytes for tensor in read) == 4 * experts  # of five, this rank has one


@pytest.mark.parametrize("deal", [False, True], ids=case_id)
@pytest.mark.parametrize("name", NAMES)
def test_one_all_reduce_replaces_that_of_the_mlp(name, deal, load, paged_run):
    """The shared expert's sum included."""

    def work(parallel: ParallelGroups):
        run = paged_run(load(name, parallel), sequences(5))
        assert parallel.tensor.traffic.bytes == 0  # loading needs nobody
        run.all_logits()
        return replace(parallel.tensor.traffic)

    for traffic in run_ranks(ParallelLayout(tensor=2), work, deal_experts=deal):
        assert traffic.all_reduce_calls == 2 * LAYERS + 1
        assert traffic.all_reduce_bytes == (2 * LAYERS + 1) * 5 * HIDDEN * BYTES


def test_traffic_between_replicas_is_each_token_once_there_and_all_back(load, paged_run):
    """Two replicas of two ranks, 7 and 4 tokens: each rank brings ceil(7 / 2) rows."""
    layout, part = ParallelLayout(data=2, tensor=2), 4

    def work(parallel: ParallelGroups):
        replica = parallel.expert.rank // 2
        run = paged_run(load("mixtral", parallel), sequences((7, 4)[replica]))
        run.all_logits()
        return replace(parallel.expert.traffic), replace(parallel.tensor.traffic)

    for expert, tensor in run_ranks(layout, work, deal_experts=True):
        assert expert.gather_calls == 2 * LAYERS and expert.all_reduce_calls == 0
        assert expert.gather_bytes == LAYERS * (part + 4 * part) * HIDDEN * BYTES
        assert tensor.all_reduce_calls == LAYERS + 1  # attention and embedding; experts' sums come scattered
        assert tensor.gather_calls == LAYERS + 1  # the scattered rows, and the logits


def test_dummy_weights_are_the_same_whatever_the_layout(load, paged_run):
    (expected,) = run_ranks(
        ParallelLayout(), lambda p: paged_run(load("granite-moe", p, load_format="dummy"), sequences(6)).all_logits()
    )
    for deal in (False, True):
        results = run_ranks(
            ParallelLayout(tensor=2),
            lambda p: paged_run(load("granite-moe", p, load_format="dummy"), sequences(6)).all_logits(),
            deal_experts=deal,
        )
        for found in results:
            assert_equal(found, expected)
