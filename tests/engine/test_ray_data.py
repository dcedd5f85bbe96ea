"""Batch inference over a data set: the configuration, the actor's class without Ray, and one real run."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from course_lib.entrypoints.ray_data import (
    EngineProcessorConfig,
    build_llm_processor,
    build_processor,
    vLLMEngineProcessorConfig,
)
from course_lib.entrypoints.ray_stage import ERROR_COLUMN, ROW_COLUMN, EngineStage
from course_lib.errors import EngineDeadError
from tests.oracle import Oracle

pa = pytest.importorskip("pyarrow")

GREEDY = {"temperature": 0, "max_tokens": 4}
TOKENS_ONLY = {"skip_tokenizer_init": True, "device": "cpu", "block_size": 4, "num_gpu_blocks_override": 64}


def config(**changes: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(**{"model_source": "nowhere/nothing", **changes})


# ---- arguments; Ray is not there ---------------------------------------------------------------------


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, course_lib.entrypoints.ray_data as m; m.EngineProcessorConfig(model_source='x');"
        "import course_lib.entrypoints.ray_local;"
        "assert not {'ray', 'pyarrow', 'pandas', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_names_of_scripts_for_vllm_and_their_defaults() -> None:
    assert vLLMEngineProcessorConfig is EngineProcessorConfig and build_processor is build_llm_processor
    plain = config()
    assert (plain.concurrency, plain.batch_size, plain.max_concurrent_batches) == ((1, 1), 64, 8)
    assert plain.engine_kwargs == {} and plain.should_continue_on_error is False
    assert plain.chat_template_stage == {"enabled": True}
    # At the one value that works, an argument may be said.
    config(task_type="generate", accelerator_type=None, prepare_multimodal_stage=False, has_image=False)
    assert config(concurrency=(1, 3)).concurrency == (1, 3)
    assert config(chat_template_stage={"chat_template": "x"}).chat_template_stage["enabled"] is True


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batchsize": 3}, TypeError, "unknown argument 'batchsize'; did you mean 'batch_size'"),
        ({"zzz": 3}, TypeError, "Known arguments: model_source, engine_kwargs"),
        ({"model_source": None}, TypeError, "model_source must be a folder or a model id"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"batch_size": "64"}, TypeError, "batch_size must be an int"),
        ({"max_concurrent_batches": 0}, ValueError, "max_concurrent_batches must be"),
        ({"concurrency": 0}, ValueError, "concurrency must be"),
        ({"concurrency": (2, 1)}, ValueError, "the first must be at most the second"),
        ({"concurrency": (1, 2, 3)}, ValueError, "give a number of engines, or"),
        ({"should_continue_on_error": 1}, TypeError, "should_continue_on_error must be True or False"),
        ({"chat_template_stage": {"batch_size": 2}}, ValueError, "chat_template_stage has 'batch_size'"),
        ({"tokenize_stage": {"batch_size": 2}}, TypeError, "tokenize_stage must be True or False"),
        ({"runtime_env": "x"}, TypeError, "runtime_env must be a dict"),
        ({"engine_kwargs": [1]}, TypeError, "engine_kwargs must be a dict"),
        ({"engine_kwargs": {"model": "x"}}, ValueError, "say it as model_source"),
        ({"engine_kwargs": {"max_model_length": 3}}, TypeError, "did you mean 'max_model_len'"),
        ({"task_type": "embed"}, ValueError, "task_type='embed' is not supported: this engine generates"),
        ({"accelerator_type": "L4"}, ValueError, "accelerator_type='L4' is not supported"),
        ({"placement_group_config": {}}, ValueError, "placement_group_config={} is not supported"),
        ({"dynamic_lora_loading_path": "x"}, ValueError, "merge them into the weights"),
        ({"log_engine_metrics": True}, ValueError, "log_engine_metrics=True is not supported"),
        ({"max_pending_requests": 9}, ValueError, "max_pending_requests=9 is not supported"),
        ({"max_tasks_in_flight_per_actor": 9}, ValueError, "set max_concurrent_batches instead"),
        ({"has_image": True}, ValueError, "prompts are text only"),
        ({"apply_chat_template": False}, ValueError, "say chat_template_stage=True or False"),
        ({"chat_template": "x"}, ValueError, "say chat_template_stage="),
    ],
)
def test_arguments_that_do_not_work_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        config(**arguments)


def test_building_checks_the_functions_and_the_engine(tiny_model_path: Path) -> None:
    good = config(model_source=tiny_model_path, engine_kwargs=TOKENS_ONLY)
    with pytest.raises(TypeError, match="config must be an EngineProcessorConfig, not dict"):
        build_llm_processor({})
    with pytest.raises(TypeError, match="preprocess must be a function from row to row, not 3"):
        build_llm_processor(good, preprocess=3)
    with pytest.raises(TypeError, match="postprocess must be a function"):
        build_llm_processor(good, postprocess=dict)
    too_long = config(model_source=tiny_model_path, engine_kwargs={**TOKENS_ONLY, "max_model_len": 65})
    with pytest.raises(ValueError, match="max_model_len=65 is beyond the 64 positions"):
        build_llm_processor(too_long)


# ---- rows through the engine; Ray is not there ---------------------------------------------------------


@pytest.fixture(scope="module")
def chat_model_path(course_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the course model's words: what it says means nothing, but it says it at once."""
    path = tmp_path_factory.mktemp("chat-llama")
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=49152, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(path)
    AutoTokenizer.from_pretrained(course_model_path).save_pretrained(path)
    return path


def stage(path: Path, **changes: Any) -> EngineStage:
    settings: dict[str, Any] = {
        "model_source": str(path), "engine_kwargs": {"device": "cpu", "kv_cache_memory_bytes": 1 << 20},
        "template": {"enabled": True}, "detokenize": True, "continue_on_error": False,
        "num_threads": torch.get_num_threads(), "num_engines": 1,
    }  # fmt: skip
    return EngineStage(**{**settings, **changes})


async def answers(engine: EngineStage, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    packed = [pickle.dumps((f"row {number}", row)) for number, row in enumerate(rows)]
    table = await engine(pa.table({ROW_COLUMN: pa.array(packed, pa.binary())}))
    return [pickle.loads(one)[1] for one in table[ROW_COLUMN].to_pylist()]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "sampling_params": GREEDY, **more}


def test_an_answered_row_has_the_columns_of_rays_stage(chat_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model_path)

    async def run() -> None:
        row = chat("one two", id=7, sampling_params={**GREEDY, "logprobs": 1, "prompt_logprobs": 1})
        (answer,) = await answers(stage(chat_model_path), row)
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        assert answer["id"] == 7 and answer["messages"] == row["messages"] and "sampling_params" not in answer
        assert answer["prompt"] == prompt
        assert answer["prompt_token_ids"] == tokenizer.encode(prompt, add_special_tokens=False)
        assert answer["num_input_tokens"] == len(answer["prompt_token_ids"])
        assert answer["num_generated_tokens"] == len(answer["generated_tokens"]) == 4
        generated = answer["generated_tokens"]
        assert answer["generated_text"] == tokenizer.decode(generated, skip_special_tokens=True)
        assert answer["logprobs"][0][generated[0]].keys() == {"logprob", "rank", "decoded_token"}
        assert answer["prompt_logprobs"][0] is None
        assert len(answer["prompt_logprobs"]) == answer["num_input_tokens"]
        assert answer["metrics"]["finished_time"] >= answer["metrics"]["arrival_time"]
        assert answer["request_id"] == 0 and answer["time_taken_llm"] > 0 and len(answer["batch_uuid"]) == 32
        assert answer["params"].startswith("SamplingParams(") and answer[ERROR_COLUMN] == ""

    asyncio.run(run())


def test_batches_overlap_and_change_nothing(chat_model_path: Path) -> None:
    async def run() -> None:
        engine = stage(chat_model_path)
        rows = [chat("word " * number) for number in range(1, 7)]
        together = await asyncio.gather(answers(engine, *rows[:3]), answers(engine, *rows[3:]))
        alone = [(await answers(engine, row))[0] for row in rows]
        for (one, other) in zip([*together[0], *together[1]], alone, strict=True):
            assert one["generated_tokens"] == other["generated_tokens"] and one["prompt"] == other["prompt"]
        assert {one["request_id"] for one in [*together[0], *together[1]]} == set(range(6))
        assert together[0][0]["batch_uuid"] == together[0][1]["batch_uuid"] != together[1][0]["batch_uuid"]

    asyncio.run(run())


def test_prompts_and_token_ids_without_the_template(chat_model_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_model_path)

    async def run() -> None:
        engine = stage(chat_model_path, template={"enabled": False})
        ids = tokenizer.encode("a b c")
        silent = {**GREEDY, "detokenize": False}
        text, tokens, decoded = await answers(
            engine,
            {"prompt": "a b c", "sampling_params": GREEDY},
            {"tokenized_prompt": ids, "sampling_params": GREEDY},
            {"prompt": "a b c", "sampling_params": silent},
        )
        assert text["prompt"] == "a b c" and tokens["prompt"] == "" and "tokenized_prompt" not in tokens
        assert text["prompt_token_ids"] == tokens["prompt_token_ids"] == ids
        assert text["generated_text"] == tokens["generated_text"] == decoded["generated_text"] != ""
        engine = stage(chat_model_path, template={"enabled": False}, detokenize=False)
        (undecoded,) = await answers(engine, {"prompt": "a b c", "sampling_params": silent})
        assert undecoded["generated_text"] == ""

    asyncio.run(run())


def test_templates_of_ones_own_and_answers_begun(chat_model_path: Path) -> None:
    async def run() -> None:
        template = {
            "enabled": True,
            "chat_template": "{{ greeting }} {{ messages[-1].content }}",
            "chat_template_kwargs": {"greeting": "Hail"},
        }
        (answer,) = await answers(stage(chat_model_path, template=template), chat("there"))
        assert answer["prompt"] == "Hail there"
        row = chat("Who?")
        row["messages"].append({"role": "assistant", "content": "It is"})
        (answer,) = await answers(stage(chat_model_path), row)
        assert answer["prompt"].endswith("<|im_start|>assistant\nIt is")

    asyncio.run(run())


BAD_ROWS = [
    (chat("word " * 200), ValueError, "leaves no room to generate within max_model_len=128"),
    ({"sampling_params": GREEDY, "prompt": "x"}, ValueError, "no 'messages': give some, or 'prompt' and"),
    ({"messages": "hello", "sampling_params": GREEDY}, TypeError, "'messages' must be a list of messages"),
    ({"messages": [], "sampling_params": GREEDY}, ValueError, "messages is empty"),
    ({"messages": [{"role": "user", "content": "x"}]}, TypeError, "'sampling_params' must be a dict, such"),
    (chat("x", sampling_params={"temprature": 0}), TypeError, "temprature"),
    (chat("x", sampling_params={"n": 2}), ValueError, "n=2: a row holds one answer"),
    (chat("x", model="my/adapter"), ValueError, "column 'model' asks for 'my/adapter'"),
    (chat("x", multimodal_data={}), ValueError, "column 'multimodal_data': prompts are text only"),
]


@pytest.mark.parametrize(("row", "error", "words"), BAD_ROWS)
def test_a_bad_row_is_named(
    chat_model_path: Path, row: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"^row 1: .*{re.escape(words)}"):
        asyncio.run(answers(stage(chat_model_path), chat("good"), row))


def test_bad_rows_do_not_lose_the_good_ones(chat_model_path: Path) -> None:
    async def run() -> None:
        engine = stage(chat_model_path, continue_on_error=True)
        (alone,) = await answers(engine, chat("good"))
        rows = [chat("good"), *(row for row, _, _ in BAD_ROWS), chat("good")]
        got = await answers(engine, *rows)
        for answer in (got[0], got[-1]):
            assert answer["generated_tokens"] == alone["generated_tokens"] and answer[ERROR_COLUMN] == ""
        for answer, (row, error, words) in zip(got[1:-1], BAD_ROWS, strict=True):
            assert answer[ERROR_COLUMN].startswith(f"{error.__name__}: ") and words in answer[ERROR_COLUMN]
            assert answer.keys() >= alone.keys() - {"messages"} and "sampling_params" not in answer
            assert answer.get("messages") == row.get("messages")
            assert answer["generated_text"] == "" and answer["num_generated_tokens"] == 0
            assert answer["request_id"] == -1
        engine._engine.shutdown()
        with pytest.raises(EngineDeadError):  # not one row's fault: nothing can go on
            await answers(engine, chat("good"))

    asyncio.run(run())


def test_rays_processes_start_without_a_slow_import(monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.entrypoints.ray_local import _slow_import_left_out

    code = "try: import rfc3987_syntax\nexcept ImportError as error: print(error.msg)"
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.delitem(sys.modules, "rfc3987_syntax", raising=False)
    with _slow_import_left_out():
        with pytest.raises(ImportError):
            __import__("rfc3987_syntax")
        assert os.environ["PYTHONPATH"].endswith(os.pathsep + "elsewhere")
        said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith("left out by")
    assert os.environ["PYTHONPATH"] == "elsewhere" and "rfc3987_syntax" not in sys.modules
    monkeypatch.delenv("PYTHONPATH")
    with _slow_import_left_out():
        pass
    assert "PYTHONPATH" not in os.environ


# ---- through Ray --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """Ray on two CPUs; afterwards none of its processes may be left."""
    ray = pytest.importorskip("ray")
    import psutil

    from course_lib.entrypoints.ray_local import start_local_ray

    start_local_ray(2)
    start_local_ray(2)  # as when a cell is run again
    with pytest.raises(RuntimeError, match=r"with 2 CPUs: use it so, or call ray.shutdown"):
        start_local_ray(3)
    yield ray
    started = psutil.Process().children(recursive=True)
    assert any("raylet" in process.name() for process in started)
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=30)
    # In a container nobody may collect the dead.
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of Ray's own settings
def test_a_data_set_through_ray(local_ray: Any, tiny_model_path: Path, oracle: Oracle) -> None:
    prompts = {number: [3 + number, 5, 8 + 2 * number] for number in range(9)}
    prompts[4] = [3] * 70  # longer than the model takes

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        params = {"temperature": 0, "max_tokens": 2 + row["id"], "ignore_eos": True}
        if row["id"] % 2:
            params["stop_token_ids"] = [0]  # other rows have no such key
        return {"tokenized_prompt": prompts[row["id"]], "sampling_params": params}

    settings = config(
        model_source=tiny_model_path, engine_kwargs=TOKENS_ONLY, batch_size=4, chat_template_stage=False,
        should_continue_on_error=True,
    )  # fmt: skip
    processor = build_llm_processor(
        settings, preprocess=preprocess,
        postprocess=lambda row: {name: row[name] for name in ("id", "num_input_tokens", "generated_tokens")},
    )  # fmt: skip
    with pytest.raises(TypeError, match=r"a processor takes a ray.data.Dataset, not list"):
        processor([])
    items = local_ray.data.from_items([{"id": number} for number in prompts])
    two = build_llm_processor(config(model_source=tiny_model_path, engine_kwargs=TOKENS_ONLY, concurrency=2))
    with pytest.raises(ValueError, match=r"concurrency=2 needs 3 CPUs .* has 2: .* ray.init\(num_cpus=3\)"):
        two(items)

    rows = {row["id"]: row for row in processor(items).take_all()}  # batches may come in any order
    assert sorted(rows) == sorted(prompts)
    assert rows[4][ERROR_COLUMN].startswith("ValueError: the prompt has 70 tokens")
    for number in prompts.keys() - {4}:
        stops = (0,) if number % 2 else ()
        expected = oracle.generate(prompts[number], 2 + number, stop_token_ids=stops)
        got = list(rows[number]["generated_tokens"])
        assert got[: expected.certain] == expected.token_ids[: expected.certain]
        assert rows[number]["num_input_tokens"] == 3 and rows[number][ERROR_COLUMN] == ""
