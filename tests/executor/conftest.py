"""A tiny model that ranks can share out, what one process makes of it, and what a process holds."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_lib import LLM, EngineArgs
from course_lib.executor.portable import plain_config
from course_lib.parallel.torch_group import open_store
from tests.executor.requests import tokens


@pytest.fixture(scope="session", autouse=True)
def one_thread_each() -> Iterator[None]:
    """Workers share this machine's cores with their neighbours, and with other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def wide_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer Llama with 8 query and 2 KV heads."""
    path = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def settings(wide_model_path: Path) -> dict[str, Any]:
    """Arguments of a small engine."""
    return {
        "model": str(wide_model_path), "skip_tokenizer_init": True, "device": "cpu", "block_size": 4,
        "num_gpu_blocks_override": 64, "max_num_seqs": 8, "disable_log_stats": True,
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_llm(settings: dict[str, Any]) -> Callable[..., LLM]:
    return lambda **arguments: LLM(**{**settings, **arguments})


@pytest.fixture(scope="session")
def config_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pickled `EngineConfig` of one process, for scripts that start without transformers: they do so in half the
    time."""
    file = tmp_path_factory.mktemp("config") / "config.pickle"
    file.write_bytes(pickle.dumps(plain_config(EngineArgs(**settings).create_engine_config())))
    return file


@pytest.fixture(scope="session")
def expected(make_llm: Callable[..., LLM]) -> list[list[int]]:
    """What one process answers to `PROMPTS`."""
    return tokens(make_llm())


def holdings() -> dict[str, Any]:
    """What this process and the system would be left with if something leaked."""
    process = psutil.Process()
    shared = Path("/dev/shm")
    return {
        "children": {child.pid for child in process.children(recursive=True)},
        "descriptors": process.num_fds(),
        "ports": {one.laddr.port for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN},
        "shared memory": {file.name for file in shared.iterdir()} if shared.is_dir() else set(),
    }


@pytest.fixture(scope="session")
def settled(expected: list[list[int]]) -> None:
    """What a process makes once and keeps, such as the first TCPStore's event loop, is made."""
    open_store("127.0.0.1", 0, serve=True)


@pytest.fixture
def nothing_left(settled: None) -> Iterator[None]:
    """After the test, no process, descriptor, port, shared memory or semaphore more than before it."""
    before = holdings()
    yield
    assert holdings() == before
