"""Models with experts: logits of tiny random ones equal transformers', and the engine's greedy tokens too."""

import copy

import pytest
import torch

from course_lib import LLM, SamplingParams
from course_lib.errors import CorruptModelError, UnsupportedModelError
from course_lib.layers.cpu_matmul import can_pack
from course_lib.models.loader import load_model
from tests.models.moe_models import CONFIGS, EXPERTS
from tests.models.test_models_parity import (
    largest_difference, reference_logits, reread, save_once, sequences,
)  # fmt: skip

TOLERANCE = 2e-5  # logits have a standard deviation of about 1
LENGTH = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_once(tmp_path_factory, CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, saved, paged_run):
    reference, folder, config = saved(name)
    model = load_model(folder, config, torch.float32, "cpu", max_model_len=LENGTH)
    prompts = sequences(1, 2, 33, LENGTH)
    expected = [reference_logits(reference, prompt) for prompt in prompts]
    assert min(logits.std().item() for logits in expected) > 0.3, "the random model says nothing"
    assert largest_difference(paged_run(model, prompts).all_logits(), expected) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_and_single_tokens_give_the_same_logits(name, saved, paged_run):
    reference, folder, config = saved(name)
    run = paged_run(load_model(folder, config, torch.float32, "cpu", max_model_len=LENGTH), sequences(14, 9))
    pieces = [run.advance(step) for step in ([5, 7], [1, 1], [8, 1])]
    ours = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    assert largest_difference(ours, [reference_logits(reference, prompt) for prompt in sequences(14, 9)]) < TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "granite-moe"])
def test_greedy_tokens_of_the_engine_equal_those_of_transformers(name, saved):
    reference, folder, _ = saved(name)
    prompts = sequences(9, 3, 20)
    llm = LLM(model=str(folder), skip_tokenizer_init=True, device="cpu", block_size=4, num_gpu_blocks_override=32)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        for token in output.outputs[0].token_ids:
            logits = reference_logits(reference, tokens)[-1]
            best = logits.topk(2).values
            assert token == logits.argmax() or best[0] - best[1] < 1e-4
            tokens.append(token)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_is_as_close_to_the_truth_as_transformers(dtype, saved, paged_run):
    """One layer: with more, a token sent to another expert by rounding would say nothing about ours."""
    reference, folder, config = saved("mixtral-one-layer")
    prompts = sequences(40)
    truth = reference_logits(reference, prompts[0])
    rounded = reference_logits(reread(folder, dtype), prompts[0]).float()
    model = load_model(folder, config, dtype, "cpu")
    ours = paged_run(model, prompts).all_logits()[0]
    assert ours.dtype == dtype
    assert (ours.float() - truth).square().mean() < 1.5 * (rounded - truth).square().mean()


@pytest.mark.skipif(not can_pack(torch.bfloat16, torch.device("cpu")), reason="no packed form on this processor")
def test_experts_are_packed_with_the_rest_and_unpacked_for_new_weights(saved, paged_run):
    _, folder, config = saved("mixtral-one-layer")
    model, prompts = load_model(folder, config, torch.bfloat16, "cpu"), sequences(40)
    plain, logits = model.state_dict(), paged_run(model, prompts).all_logits()[0]
    model.pack_weights()
    [experts] = model._experts()
    assert experts.gate_up is None and len(experts.packed) == EXPERTS
    torch.testing.assert_close(paged_run(model, prompts).all_logits()[0], logits, atol=0.1, rtol=0)
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    model.load_weights([(name, torch.ones(96, 112))])
    assert len(experts.packed) == EXPERTS
    model.unpack_weights()
    assert experts.down[2].eq(1).all()
    experts.down[2] = plain["model.layers.0.block_sparse_moe.experts.down"][2]
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


def test_experts_that_cannot_be_packed_stay_parameters(saved):
    _, folder, config = saved("mixtral-one-layer")
    model = load_model(folder, config, torch.float32, "cpu")  # random numbers: none is a float16
    weights = sum(parameter.numel() for parameter in model.parameters())
    model.pack_weights()
    [experts] = model._experts()
    assert experts.gate_up is not None and sum(parameter.numel() for parameter in model.parameters()) == weights
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    model.load_weights([(name, torch.ones(96, 112))])  # which are, and so packed alone where float32 is
    model.pack_weights()
    model.load_weights([(name, torch.full((96, 112), 2.0))])
    model.unpack_weights()
    assert experts.down[2].eq(2).all()


def test_experts_that_do_not_fit_the_configuration_are_named(saved):
    config = saved("mixtral")[2]
    fewer = copy.deepcopy(config)
    fewer.num_local_experts -= 1
    with pytest.raises(CorruptModelError, match=r"unexpected tensor .*block_sparse_moe\.experts\.4\."):
        load_model(saved("mixtral")[1], fewer, torch.float32, "cpu")
    more = copy.deepcopy(config)
    more.num_local_experts += 1
    with pytest.raises(CorruptModelError, match=r"gate\.weight.*\[5, 96\].*\[6, 96\]"):
        load_model(saved("mixtral")[1], more, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "granite-moe"])
def test_another_activation_is_refused(name, saved):
    config = copy.deepcopy(saved(name)[2])
    config.hidden_act = "gelu"
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'"):
        load_model(".", config, torch.float32, "meta", load_format="dummy")
