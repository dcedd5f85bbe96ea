"""Bad input: each is an error at the door that names the argument, and the others are served on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from course_lib import LLM, EngineArgs, LLMEngine, SamplingParams
from course_lib.errors import CorruptModelError, CourseError, UnsupportedModelError
from tests.engine.conftest import MAX_MODEL_LEN, VOCAB

GOOD = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ([3] * MAX_MODEL_LEN, ValueError, "max_model_len=64"),
        ([3] * 500, ValueError, "500 tokens"),
        ([], ValueError, "empty"),
        ({"prompt_token_ids": []}, ValueError, "empty"),
        ([3, VOCAB], ValueError, f"id {VOCAB} is out of range"),
        ([3, -1], ValueError, "id -1 is out of range"),
        ([3, 2**70], ValueError, "out of range"),
        ([3.0, 4.0], TypeError, "integers"),
        ([True, False], TypeError, "integers"),
        (["a"], TypeError, "integers"),
        (3, TypeError, "prompt must be"),
        (None, TypeError, "prompt must be"),
        (b"bytes", TypeError, "prompt must be"),
        ({}, ValueError, "'prompt' or 'prompt_token_ids'"),
        ({"promt": "x"}, ValueError, "unknown prompt keys"),
        ({"prompt": 3}, TypeError, "must be a string"),
        ({"prompt_token_ids": "abc"}, TypeError, "must be a list"),
        ({"prompt_token_ids": [3], "multi_modal_data": {"image": 1}}, ValueError, "images"),
        ({"prompt_token_ids": [3], "prompt_embeds": [1]}, ValueError, "embeddings"),
        ({"prompt_token_ids": [3], "cache_salt": 4}, TypeError, "cache_salt"),
        ("text without a tokenizer", ValueError, "skip_tokenizer_init"),
    ],
)
def test_bad_prompts(tiny_engine: LLMEngine, prompt: object, error: type, says: str) -> None:
    tiny_engine.add_request("good", [3, 4, 5], GOOD)
    tiny_engine.step()
    with pytest.raises(error, match=says):
        tiny_engine.add_request("bad", prompt, GOOD)
    assert _finish(tiny_engine)["good"] == _finish_alone(tiny_engine)


@pytest.mark.parametrize(
    ("params", "error", "says"),
    [
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"top_p": 0}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"top_k": -2}, ValueError, "top_k"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"min_p": 1.1}, ValueError, "min_p"),
        ({"presence_penalty": 3}, ValueError, "presence_penalty"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"n": 0}, ValueError, "n must be"),
        ({"n": 2, "temperature": 0}, ValueError, "greedy"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, ValueError, "min_tokens"),
        ({"stop": ""}, ValueError, "stop"),
        ({"stop": ["x"], "detokenize": False}, ValueError, "detokenize"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids"),
        ({"logit_bias": {3: math.nan}}, ValueError, "logit_bias"),
        ({"guided_decoding": {"json": {}}}, ValueError, "guided_decoding"),
        ({"temprature": 1}, TypeError, "temperature"),
    ],
)
def test_bad_sampling_params(params: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        SamplingParams(**params)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"allowed_token_ids": [VOCAB + 5]}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"logprobs": 21}, "max_logprobs=20"),
        ({"prompt_logprobs": -1}, "max_logprobs=20"),
        ({"stop": "x"}, "stop needs a tokenizer"),
    ],
)
def test_params_that_do_not_fit_the_model(tiny_engine: LLMEngine, params: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tiny_engine.add_request("bad", [3], SamplingParams(**params))
    assert not tiny_engine.has_unfinished_requests()


def test_params_made_bad_after_their_construction_are_refused(tiny_engine: LLMEngine) -> None:
    params = SamplingParams()
    params.top_p = 7.0
    with pytest.raises(ValueError, match="top_p"):
        tiny_engine.add_request("bad", [3], params)


def test_other_arguments_of_a_request(tiny_engine: LLMEngine) -> None:
    tiny_engine.add_request("a", [3], GOOD)
    for arguments, error, says in (
        (("a", [3], GOOD), ValueError, "choose another"),
        ((7, [3], GOOD), TypeError, "request_id"),
        (("b", [3], {"temperature": 0}), TypeError, "SamplingParams"),
    ):
        with pytest.raises(error, match=says):
            tiny_engine.add_request(*arguments)
    for keywords, says in (({"priority": 3}, "scheduling_policy"), ({"lora_request": "x"}, "lora_request")):
        with pytest.raises(ValueError, match=says):
            tiny_engine.add_request("b", [3], GOOD, **keywords)
    _finish(tiny_engine)


def test_llm_refuses_the_whole_call_and_runs_nothing(llm: LLM) -> None:
    for arguments, error, says in (
        ((["a", "b"], [SamplingParams()]), ValueError, "1 entries for 2 prompts"),
        ((["a", ""], SamplingParams()), ValueError, "prompt 1: the prompt is empty"),
        ((["a"], "greedy"), TypeError, "sampling_params"),
        ((None,), TypeError, "prompts must be"),
    ):
        with pytest.raises(error, match=says):
            llm.generate(*arguments)
        assert not llm.llm_engine.has_unfinished_requests()
    for messages, error, says in (
        ([], TypeError, "non-empty"),
        ("hello", TypeError, "non-empty"),
        ([{"content": "no role"}], TypeError, r"messages\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "content parts"),
        ([{"role": "user", "content": 5}], TypeError, "content"),
    ):
        with pytest.raises(error, match=says):
            llm.chat(messages)
    for method in (llm.embed, llm.classify, llm.score, llm.encode):
        with pytest.raises(ValueError, match="generation models only"):
            method(["x"])
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"max_model_length": 5}, TypeError, "did you mean 'max_model_len'"),
        ({"block_size": 24}, ValueError, "power of two"),
        ({"block_size": 512}, ValueError, "power of two"),
        ({"max_model_len": 65}, ValueError, "64 positions"),
        ({"max_model_len": 0}, ValueError, "max_model_len"),
        ({"max_model_len": 8.5}, TypeError, "max_model_len"),
        ({"max_model_len": 64, "num_gpu_blocks_override": 3}, ValueError, "max_model_len to at most 48"),
        ({"max_model_len": 64, "kv_cache_memory_bytes": 100}, ValueError, "too few"),
        ({"max_num_seqs": 8, "max_num_batched_tokens": 4}, ValueError, "max_num_seqs=8"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 32, "max_num_seqs": 4}, ValueError, "chunked"),
        ({"gpu_memory_utilization": math.nan}, ValueError, "gpu_memory_utilization"),
        ({"dtype": "int3"}, ValueError, "dtype"),
        ({"scheduling_policy": "lifo"}, ValueError, "fcfs"),
        ({"tensor_parallel_size": 2}, ValueError, "tensor_parallel_size=2 is not supported"),
        ({"quantization": "awq"}, ValueError, "quantization"),
        ({"enable_lora": True}, ValueError, "enable_lora"),
        ({"speculative_config": {"method": "ngram"}}, ValueError, "speculative_config"),
        ({"enable_prefix_caching": "yes"}, TypeError, "enable_prefix_caching"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_engine_arguments(tiny_model_path: Path, arguments: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        LLM(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", **arguments)


def test_a_length_nobody_asked_for_is_lowered_to_what_the_cache_holds(tiny_model_path: Path) -> None:
    llm = LLM(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", num_gpu_blocks_override=2)
    assert llm.llm_engine.get_model_config().max_model_len == 32
    with pytest.raises(ValueError, match="max_model_len=32"):
        llm.generate([[3] * 40], GOOD)
    assert len(llm.generate([[3] * 30], GOOD)[0].outputs[0].token_ids) == 2


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="config.json|tokenizer|folder|model"):
        LLM(model=str(tmp_path))
    with pytest.raises(TypeError, match="model must be"):
        LLM(model=None)


def test_a_folder_without_a_tokenizer_says_so_before_loading_weights(tiny_model_path: Path) -> None:
    with pytest.raises(CorruptModelError, match="skip_tokenizer_init"):
        LLM(model=str(tiny_model_path), device="cpu")


def test_an_architecture_that_is_not_supported(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=32, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        LLM(model=str(tmp_path), skip_tokenizer_init=True, device="cpu")


def test_engine_args_defaults_are_valid(tiny_model_path: Path) -> None:
    config = EngineArgs(model=str(tiny_model_path), skip_tokenizer_init=True).create_engine_config()
    assert config.scheduler.max_num_seqs == 256 and config.cache.block_size == 16


def _finish(engine: LLMEngine) -> dict[str, list[int]]:
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0].token_ids
    return finished


def _finish_alone(engine: LLMEngine) -> list[int]:
    engine.add_request("alone", [3, 4, 5], GOOD)
    return _finish(engine)["alone"]
