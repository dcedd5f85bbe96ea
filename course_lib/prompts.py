"""The shapes a prompt may have, as vLLM's `TextPrompt` and `TokensPrompt`.

A prompt is a string, a list of token ids, or one of these dictionaries.

vLLM: `vllm/inputs/data.py`.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """Text to tokenize."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """Tokens as they are."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType = str | list[int] | TextPrompt | TokensPrompt
