"""Tiny models with clear-cut logits, so that engines can be built and compared in milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle import Oracle

VOCAB = 61
MAX_MODEL_LEN = 64


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped-query attention. Large initial weights spread its logits, so that
    near-ties are rare."""
    path = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=MAX_MODEL_LEN, initializer_range=0.4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def oracle(tiny_model_path: Path) -> Oracle:
    return Oracle(str(tiny_model_path), MAX_MODEL_LEN)
