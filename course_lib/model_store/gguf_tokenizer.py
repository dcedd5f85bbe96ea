"""The tokenizer in a GGUF file → Hugging Face's tokenizer files.

A GGUF file holds vocabulary and merges, and of the rest only a name ("smollm"). What that name means
is restored here: every digit is a token of its own, then byte-level BPE with GPT-2's pattern. Reading
the file through transformers loses the digits rule ("12345" comes out as longer pieces than the model
was trained on).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_lib.errors import UnsupportedModelError

CONTROL = 3  # llama.cpp's token type of special tokens


def write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    fields: the GGUF file's metadata. Raises UnsupportedModelError for another kind of tokenizer.
    """
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise UnsupportedModelError(f"The GGUF tokenizer {kind} is not SmolLM's ('gpt2', 'smollm').")
    build_tokenizer(fields).save(str(folder / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
    }
    config = {
        **special,
        # the class that takes tokenizer.json as it is; a model's own class would rebuild its pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of a GGUF file's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, fields["tokenizer.ggml.token_type"])
            if token_type == CONTROL
        ]
    )
    return tokenizer
