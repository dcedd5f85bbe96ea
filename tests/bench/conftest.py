"""A tiny random model with the course model's tokenizer, so that benchmarks of text run in milliseconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory: pytest.TempPathFactory, course_model_path: Path) -> Path:
    path = tmp_path_factory.mktemp("tiny-text")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(course_model_path / name, path)
    return path
