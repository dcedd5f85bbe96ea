"""A dense Llama made into a mixture at load time: how far from the dense model, and the same on every rank."""

from __future__ import annotations

import pytest
import torch
import transformers

from course_lib import LLM, EngineArgs, SamplingParams
from course_lib.config import read_hf_config, upcycle
from course_lib.errors import UnsupportedModelError
from course_lib.layers.routing import route
from course_lib.models import upcycled
from course_lib.models.loader import load_model
from course_lib.parallel.group import ParallelGroups
from course_lib.parallel.layout import ParallelLayout
from tests.models.test_models_parity import largest_difference, llama, random_model, sequences
from tests.parallel.ranks import run_ranks

EXPERTS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    random_model(llama(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def load(folder, parallel: ParallelGroups | None = None, *, num_experts: int | None = EXPERTS):
    config = read_hf_config(folder)
    if num_experts is not None:
        upcycle(config, num_experts)
    return load_model(folder, config, torch.float32, "cpu", max_model_len=64, parallel=parallel)


def test_with_no_differences_it_is_the_dense_model(folder, paged_run, monkeypatch):
    monkeypatch.setattr(upcycled, "STRENGTH", 0.0)
    dense, mixture = (paged_run(load(folder, num_experts=n), sequences(30)).all_logits() for n in (None, EXPERTS))
    assert largest_difference(mixture, dense) < 2e-5


def test_the_difference_grows_with_the_strength(folder, paged_run, monkeypatch):
    dense = paged_run(load(folder, num_experts=None), sequences(30)).all_logits()
    differences = []
    for strength in (0.001, 0.002):
        monkeypatch.setattr(upcycled, "STRENGTH", strength)
        differences.append((paged_run(load(folder), sequences(30)).all_logits()[0] - dense[0]).square().mean().sqrt())
    assert 1e-4 < differences[0] < 2e-2
    assert differences[1] / differences[0] == pytest.approx(2, rel=0.2)


def test_experts_differ_from_each_other_and_every_one_gets_tokens(folder, paged_run):
    model = load(folder)
    chosen = []
    for mixture in model.mixtures():
        neighbours = mixture.experts.gate_up[1:, :, 0] / mixture.experts.gate_up[:-1, :, 0] - 1
        assert (0.7 < neighbours.std(dim=1) / (2**0.5 * upcycled.STRENGTH)).all()
        assert (neighbours.std(dim=1) / (2**0.5 * upcycled.STRENGTH) < 1.4).all()
        mixture.router.register_forward_hook(lambda module, inputs, logits: chosen.append(logits))
    paged_run(model, sequences(64)).all_logits()
    for logits in chosen:
        counts = torch.bincount(route(logits, 2, renormalize=True)[1].flatten(), minlength=EXPERTS)
        assert counts.min() > 0 and counts.sum() == 2 * 64


@pytest.mark.parametrize(
    "layout, deal",
    [(ParallelLayout(tensor=2), False), (ParallelLayout(tensor=2), True), (ParallelLayout(data=2, pipeline=2), True)],
    ids=["cut", "dealt", "replicas"],
)  # fmt: skip
def test_every_rank_derives_the_same_model(folder, paged_run, layout, deal):
    expected = paged_run(load(folder), sequences(12)).all_logits()
    whole = load(folder).state_dict()

    def work(parallel: ParallelGroups):
        model = load(folder, parallel)
        for name, parameter in model.state_dict().items():
            if ".experts." in name:
                share = model.get_submodule(name.rpartition(".")[0]).share
                parts = whole[name][share.experts.start : share.experts.stop]
                if name.endswith("down"):
                    parts = parts[:, :, share.inner.start : share.inner.stop]
                else:
                    halves = parts.chunk(2, dim=1)
                    parts = torch.cat([half[:, share.inner.start : share.inner.stop] for half in halves], dim=1)
                assert torch.equal(parameter, parts)
        return paged_run(model, sequences(12)).all_logits()

    for found in run_ranks(layout, work, deal_experts=deal):
        assert not found or largest_difference(found, expected) < 1e-5


def test_the_course_model_still_speaks(course_model_path, paged_run):
    """Two of four experts per token; a bound on the logits, and the same greedy answer."""
    llm = LLM(model=str(course_model_path), device="cpu", dtype="float32", max_model_len=128, upcycle_experts=4,
              kv_cache_memory_bytes=32 << 20)  # fmt: skip
    question = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = llm.chat(question, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert answer.outputs[0].text == "The capital of France is Paris."
    [mixture] = llm.collective_rpc(lambda runner: runner.model)
    prompt = answer.prompt_token_ids + answer.outputs[0].token_ids
    dense = load_model(course_model_path, read_hf_config(course_model_path), torch.float32, "cpu", max_model_len=128)
    ours, theirs = (paged_run(model, [prompt]).all_logits()[0] for model in (mixture, dense))
    difference = (ours - theirs).abs()
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    print(f"logits, of standard deviation {theirs.std():.1f}, differ by {difference.mean():.3f} on average and "
          f"{difference.max():.3f} at most; {agree:.0%} of the most likely tokens are the same")  # fmt: skip
    assert 1e-3 < difference.mean() < 0.25 and difference.max() < 2
    assert agree > 0.9


# ---- what is refused --------------------------------------------------------------------------------


def test_what_cannot_be_upcycled_is_refused(tmp_path):
    random_model(llama(mlp_bias=True)).save_pretrained(tmp_path / "biases")
    with pytest.raises(UnsupportedModelError, match="mlp_bias"):
        load(tmp_path / "biases")
    transformers.MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(tmp_path / "mistral")
    args = EngineArgs(model=str(tmp_path / "mistral"), device="cpu", skip_tokenizer_init=True, upcycle_experts=4)
    with pytest.raises(ValueError, match="upcycle_experts=4 .*MistralForCausalLM: leave it out"):
        args.create_engine_config()


@pytest.mark.parametrize("number, error", [(1, ValueError), (0, ValueError), (True, TypeError), (2.0, TypeError)])
def test_impossible_numbers_of_experts_are_refused(folder, number, error):
    args = EngineArgs(model=str(folder), device="cpu", skip_tokenizer_init=True, upcycle_experts=number)
    with pytest.raises(error, match="upcycle_experts"):
        args.create_engine_config()


def test_the_configuration_counts_the_experts(folder):
    args = EngineArgs(model=str(folder), device="cpu", skip_tokenizer_init=True)
    assert args.create_engine_config().model.num_experts is None
    args.upcycle_experts = 6
    assert args.create_engine_config().model.num_experts == 6
