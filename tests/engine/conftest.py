"""Tiny models with clear-cut logits, so that engines can be built and compared in milliseconds; and one
engine with the course model for everything that needs text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_lib import LLM, EngineArgs, LLMEngine
from tests.oracle import Oracle

VOCAB = 61
MAX_MODEL_LEN = 64


def save_tiny_llama(path: Path, seed: int, **shape: int) -> Path:
    """A random Llama of the given sizes. Large initial weights spread its logits, so that near-ties are rare."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=MAX_MODEL_LEN, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with grouped-query attention."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("tiny-llama"), 0, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def oracle(tiny_model_path: Path) -> Oracle:
    return Oracle(str(tiny_model_path), MAX_MODEL_LEN)


@pytest.fixture
def tiny_engine(tiny_model_path: Path) -> LLMEngine:
    """A fresh engine of tokens, no text."""
    args = EngineArgs(
        model=str(tiny_model_path), skip_tokenizer_init=True, device="cpu", block_size=4, max_num_seqs=8,
        num_gpu_blocks_override=64, disable_log_stats=True,
    )  # fmt: skip
    return LLMEngine.from_engine_args(args)


@pytest.fixture(scope="session")
def shared_llm(course_model_path: Path) -> LLM:
    """The course model, loaded once. Use the fixture `llm`."""
    return LLM(model=str(course_model_path), device="cpu", max_model_len=512, kv_cache_memory_bytes=256 << 20)


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared engine; afterwards it must be idle and give all its blocks back."""
    yield shared_llm
    assert not shared_llm.llm_engine.has_unfinished_requests()
    shared_llm.llm_engine.step()  # lets the runner hear of the last endings
    pool = shared_llm.llm_engine.core.scheduler.kv_cache.pool
    assert pool.num_free == pool.num_blocks
    assert not shared_llm.llm_engine.core.executor.runner.states
