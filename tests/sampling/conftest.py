"""Two small tokenizers trained on the spot: byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and
SentencePiece-like BPE with spaces as "▁" and byte fallback (Llama 2, Mistral)."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the quick brown fox jumps over the lazy dog", "def add(a, b):\n    return a + b\n",
    "stop here, and do not stop there", "hello world", "naïve café", "नमस्ते दुनिया", "你好，世界", "مرحبا بالعالم",
] * 3
SPECIAL = ["<s>", "</s>", "<|user|>"]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    ascii_corpus = [line for line in CORPUS if line.isascii()]  # the rest falls back to bytes
    trained.train_from_iterator(ascii_corpus, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = [*byte_pieces, *(p for p, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _wrap(tokenizer)


@pytest.fixture(scope="session", params=["byte level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    name = request.param.replace(" ", "_")
    return request.getfixturevalue(f"{name}_tokenizer")
