"""Bad input: each is an error at the door that names the argument, and the others are served on."""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from course_lib import LLM, EngineArgs, LLMEngine, SamplingParams
from course_lib.attention.backend import zeros_on_demand
from course_lib.bench.cli import add_bench_arguments, run_bench
from course_lib.bench.machine import describe_machine
from course_lib.engine.input_processor import InputProcessor
from course_lib.errors import CorruptModelError, CourseError, UnsupportedModelError
from course_lib.runner.cache_size import _cgroup_rooms
from tests.engine.conftest import MAX_MODEL_LEN, VOCAB

GOOD = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONE = "\ud800"  # half of a surrogate pair


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
        ({"prompt_token_ids": [3] * 6, "cache_salt": LONE}, ValueError, "cache_salt.*not valid Unicode text"),
        (torch.tensor([3.0, 4.0]), TypeError, "integers"),
        (torch.tensor([[3, 4]]), TypeError, "prompt must be"),
        (f"half a pair {LONE}", ValueError, "prompt is not valid Unicode text: character 12"),
        ({"prompt": LONE}, ValueError, "prompt.*not valid Unicode text"),
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
        ({"bad_words": ["fine", LONE]}, ValueError, "bad_words is not valid Unicode text"),
        ({"stop": LONE}, ValueError, "stop is not valid Unicode text"),
        ({"logits_processors": [max]}, TypeError, r"f\(output_ids, logits\) or f\(prompt_ids, output_ids"),
        ({"logits_processors": [torch.relu]}, TypeError, "logits_processors"),
        ({"logits_processors": [lambda logits: logits]}, TypeError, "logits_processors"),
        ({"logits_processors": [lambda a, b, c, d: d]}, TypeError, "logits_processors"),
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
        (("b", [3], GOOD, "soon"), TypeError, "arrival_time"),
        (("b", [3], GOOD, True), TypeError, "arrival_time"),
        (("b", [3], GOOD, math.nan), ValueError, "arrival_time"),
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
        ([{"role": "user", "content": LONE}], ValueError, "content.*not valid Unicode text"),
    ):
        with pytest.raises(error, match=says):
            llm.chat(messages)
    hello = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    with pytest.raises(ValueError, match="chat template does not use them"):
        llm.chat(hello, tools=tools)
    with_tools = "{{ tools }}{{ messages[0]['content'] }}"
    params = SamplingParams(max_tokens=1)
    assert "look_up" in llm.chat(hello, params, tools=tools, chat_template=with_tools)[0].prompt
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
        ({"tensor_parallel_size": 4}, ValueError, "6 attention heads and 2 KV heads: what works is 1, 2, 6"),
        ({"pipeline_parallel_size": 3}, ValueError, "pipeline_parallel_size=3 is more than the model's 2 layers"),
        ({"distributed_executor_backend": "mpi"}, ValueError, "choose one of uni, mp, ray, external_launcher"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, ValueError, 'needs 2: use "mp"'),
        ({"distributed_executor_backend": "external_launcher"}, ValueError, "torchrun --nproc-per-node=1"),
        ({"quantization": "awq"}, ValueError, "quantization"),
        ({"enable_lora": True}, ValueError, "enable_lora"),
        ({"speculative_config": {"method": "ngram"}}, ValueError, "speculative_config"),
        ({"enable_prefix_caching": "yes"}, TypeError, "enable_prefix_caching"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"max_num_seqs": 10**10}, ValueError, "max_num_seqs"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs"),
        ({"max_model_len": 10**12}, ValueError, "max_model_len"),
        ({"num_gpu_blocks_override": 10**10}, ValueError, "num_gpu_blocks_override"),
        ({"block_size": 256, "num_gpu_blocks_override": 10**9}, ValueError, "at most 8388607"),
        ({"long_prefill_token_threshold": 4, "enable_chunked_prefill": False}, ValueError, "long_prefill"),
        ({"gpu_memory_utilization": 0.5}, ValueError, "set kv_cache_memory_bytes"),
        ({"gpu_memory_utilization": True}, ValueError, "gpu_memory_utilization"),
        ({"revision": "main"}, ValueError, "revision='main'"),
        ({"revision": 5}, TypeError, "revision"),
        ({"max_loras": 2}, ValueError, "max_loras=2 is not supported"),
        ({"max_lora_rank": 8}, ValueError, "max_lora_rank=8 is not supported"),
        ({"task": "embed"}, ValueError, "task='embed': choose one of auto, generate"),
        ({"runner": "pooling"}, ValueError, "runner"),
        ({"hf_overrides": {"num_hidden_layers": "x"}}, ValueError, "hf_overrides.*num_hidden_layers"),
        ({"hf_overrides": {"num_attention_heads": 0}}, ValueError, "hf_overrides"),
        ({"hf_overrides": {"vocab_size": -1}}, ValueError, "hf_overrides.*vocab_size"),
        ({"hf_overrides": {"trust_remote_code": True}}, ValueError, "cannot set 'trust_remote_code'"),
    ],
)
def test_bad_engine_arguments(tiny_model_path: Path, arguments: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        LLM(model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", **arguments)


def test_the_code_of_a_checkpoint_is_never_run(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "it ran"
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # a prompt would be answered with yes
    for name, changes in (
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Evil"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ):
        folder = shutil.copytree(tiny_model_path, tmp_path / name)
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
        _change(folder / name, changes)
        with pytest.raises(CourseError, match="never run|tokenizer"):
            LLM(model=str(folder), device="cpu")
        assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "", "config.json is cut off"),
        ("config.json", '{"model_type": "lla', "config.json is cut off"),
        ("config.json", "[]", "JSON object"),
        ("config.json", {"hidden_size": "x"}, "config.json.*hidden_size"),
        ("config.json", {"num_attention_heads": 0}, "config.json"),
        ("config.json", {"num_key_value_heads": 4}, "no multiple of num_key_value_heads=4"),
        ("config.json", {"num_hidden_layers": -1}, "num_hidden_layers"),
        ("config.json", {"max_position_embeddings": "8k"}, "max_position_embeddings"),
        ("generation_config.json", '{"a', "generation_config.json is cut off"),
        ("generation_config.json", "[1]", "JSON object"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "generation_config.json.*eos_token_id"),
        ("generation_config.json", {"eos_token_id": [2, None]}, "generation_config.json.*eos_token_id"),
        ("generation_config.json", {"temperature": -1}, "generation_config.json.*temperature"),
        ("generation_config.json", {"max_new_tokens": "all"}, "generation_config.json.*max_tokens"),
    ],
)
def test_broken_model_files(
    tiny_model_path: Path, tmp_path: Path, name: str, content: Any, says: str
) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "broken")
    if isinstance(content, str):
        (folder / name).write_text(content)
    else:
        _change(folder / name, content)
    with pytest.raises(CorruptModelError, match=says):
        LLM(model=str(folder), skip_tokenizer_init=True, device="cpu")


@pytest.mark.parametrize(
    ("generation", "tokenizer_eos", "primary", "stops"),
    [
        (None, None, 2, []),  # from config.json
        ([7, 13], None, 7, [13]),
        ([7, 13], 13, 13, [7]),
        ([7, 13], 2, 2, [7, 13]),
        (7, 7, 7, []),
        ([7, VOCAB + 5], None, 7, []),  # nothing can generate that
    ],
)
def test_which_tokens_end_a_sequence(
    tiny_model_path: Path,
    tmp_path: Path,
    generation: Any,
    tokenizer_eos: int | None,
    primary: int,
    stops: list[int],
) -> None:
    folder = shutil.copytree(tiny_model_path, tmp_path / "model")
    _change(folder / "generation_config.json", {"eos_token_id": generation})
    config = EngineArgs(model=str(folder), device="cpu").create_engine_config().model
    tokenizer = None if tokenizer_eos is None else SimpleNamespace(eos_token_id=tokenizer_eos)
    processor = InputProcessor(config, tokenizer)
    request = processor.process("a", [3], SamplingParams())[0]
    assert (request.eos_token_id, request.sampling_params.stop_token_ids) == (primary, stops)
    assert request.sampling_params.all_stop_token_ids == {primary, *stops}
    ignoring = processor.process("a", [3], SamplingParams(ignore_eos=True))[0]
    assert ignoring.sampling_params.stop_token_ids == []


def test_arrays_of_token_ids_and_arrival_times_are_taken(tiny_engine: LLMEngine) -> None:
    expected = _finish_alone(tiny_engine)
    tensor = torch.tensor([3, 4, 5])
    for prompt in (tensor, np.array([3, 4, 5]), {"prompt_token_ids": tensor}):
        tiny_engine.add_request("a", prompt, GOOD, arrival_time=12.5)
        assert _finish(tiny_engine)["a"] == expected


def test_logits_processors_of_any_kind_harm_nobody(tiny_engine: LLMEngine) -> None:
    expected = _finish_alone(tiny_engine)

    def writes_to_its_arguments(prompt_ids, output_ids, logits):
        prompt_ids[:] = output_ids[:] = [10**6]
        return logits

    fine = [
        lambda *arguments: arguments[-1],
        lambda o, logits, *, flag=0: logits.double(),
        writes_to_its_arguments,
    ]
    bad = [
        lambda o, logits: logits > 0,
        lambda o, logits: logits.to(torch.complex64),
        lambda o, logits: logits.to("meta"),
        lambda o, logits: logits.long(),
        lambda o, logits: None,
    ]
    for function in (*fine, *bad):
        params = GOOD.clone()
        params.logits_processors = [function]
        tiny_engine.add_request("bad", [3, 4, 5], params)
        tiny_engine.add_request("good", [3, 4, 5], GOOD)
        outputs = _finish_outputs(tiny_engine)
        assert outputs["good"].token_ids == expected
        if function in fine:
            assert outputs["bad"].token_ids == expected
        else:
            assert outputs["bad"].finish_reason != "length"


def test_max_num_seqs_follows_a_small_token_budget(tiny_model_path: Path) -> None:
    args = EngineArgs(model=str(tiny_model_path), device="cpu", max_num_batched_tokens=32)
    assert args.create_engine_config().scheduler.max_num_seqs == 32


def test_a_cache_that_cannot_be_had_says_how_to_ask_for_less() -> None:
    with pytest.raises(ValueError, match=f"{2**62} bytes.*num_gpu_blocks_override or kv_cache_memory_bytes"):
        zeros_on_demand((2**60,), torch.float32, torch.device("cpu"))


def test_the_share_of_memory_heeds_the_container(tmp_path: Path) -> None:
    assert _cgroup_rooms(tmp_path) == []
    for name, text in (("max", "1000\n"), ("current", "400\n"), ("stat", "anon 300\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _cgroup_rooms(tmp_path) == [650]
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_rooms(tmp_path) == []


def test_bench_refuses_counts_below_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    for option in ("--num-prompts", "--output-len", "--repeats"):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["throughput", option, "0"])
        assert f"{option}: must be at least 1, not 0" in capsys.readouterr().err
    assert run_bench(parser.parse_args(["throughput", "--input-len", "9", "3"])) == 2
    machine = describe_machine()
    assert {"commit", "cpu"} <= machine.keys() and json.dumps(machine)


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


def _change(file: Path, changes: dict[str, Any]) -> None:
    """Replace entries of a JSON file, which need not exist."""
    stored = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**stored, **changes}))


def _finish(engine: LLMEngine) -> dict[str, list[int]]:
    return {request_id: output.token_ids for request_id, output in _finish_outputs(engine).items()}


def _finish_outputs(engine: LLMEngine) -> dict[str, Any]:
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output.outputs[0]
    return finished


def _finish_alone(engine: LLMEngine) -> list[int]:
    engine.add_request("alone", [3, 4, 5], GOOD)
    return _finish(engine)["alone"]
