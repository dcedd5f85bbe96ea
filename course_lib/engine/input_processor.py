"""The door: prompts and parameters come in, a checked `Request` comes out, or an error that helps.

Everything a caller can get wrong is found here, before the engine has heard of the request, so that
no bad request can disturb another.

vLLM: `vllm/v1/engine/input_processor.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from course_lib.config import ModelConfig
from course_lib.core.prefix_hash import CacheKeys
from course_lib.core.request import Request
from course_lib.prompts import PromptType
from course_lib.sampling_checks import number, unicode_text
from course_lib.sampling_params import SamplingParams

_TEXT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}
_LATER_KEYS = {
    "prompt_embeds": "embeddings as prompts",
    "multi_modal_data": "images and audio",
    "encoder_prompt": "encoder-decoder models",
    "decoder_prompt": "encoder-decoder models",
}


class InputProcessor:
    """Args:
    config: the model's limits.
    tokenizer: Hugging Face tokenizer, or None if prompts come as token ids only.
    """

    def __init__(self, config: ModelConfig, tokenizer: Any | None) -> None:
        self.config = config
        self.tokenizer = tokenizer
        # As in vLLM: the tokenizer says which token is *the* end of a sequence, the model's files add more.
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos_token_id: int | None = own if own is not None else next(iter(config.eos_token_ids), None)
        self.further_end_ids = [t for t in config.eos_token_ids if t != self.eos_token_id]

    def process(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> tuple[Request, str | None]:
        """Check everything and build the request.

        Args:
            arrival_time: seconds on `time.time`'s clock; now if None.

        Returns:
            The request, and the prompt's text if it came as text.

        Raises:
            TypeError, ValueError: naming the argument and the remedy.
        """
        if not isinstance(request_id, str) or not request_id:
            raise TypeError(f"request_id must be a non-empty string, not {request_id!r}")
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params must be a SamplingParams, not {type(params).__name__}")
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise TypeError(f"priority must be an integer (smaller is served first), not {priority!r}")
        arrival_time = time.time() if arrival_time is None else number("arrival_time", arrival_time)
        text, token_ids, cache_salt = self._read_prompt(prompt)
        params = self._resolve_params(params)
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        self._check_tokens(token_ids)
        if params.max_tokens is None:
            params.max_tokens = self.config.max_model_len - len(token_ids)
        request = Request(
            request_id,
            token_ids,
            params,
            eos_token_id=self.eos_token_id,
            arrival_time=arrival_time,
            priority=priority,
            cache_keys=None if cache_salt is None else CacheKeys(salt=cache_salt),
        )
        return request, text

    def _read_prompt(self, prompt: PromptType) -> tuple[str | None, list[int], str | None]:
        """Returns text (if given), token ids, cache salt."""
        cache_salt = None
        text: Any = None
        token_ids: Any = None
        if isinstance(prompt, str):
            text = unicode_text("prompt", prompt)
        elif isinstance(prompt, dict):
            text, token_ids, cache_salt = self._read_dict(prompt)
        elif _is_sequence(prompt):
            token_ids = prompt
        else:
            raise TypeError(
                f"prompt must be a string, a list of token ids, or a dict with 'prompt' or "
                f"'prompt_token_ids', not {type(prompt).__name__}"
            )
        if token_ids is None:
            return text, self._tokenize(text), cache_salt
        if hasattr(token_ids, "tolist"):  # NumPy's and torch's numbers become Python's
            token_ids = token_ids.tolist()
        if set(map(type, token_ids)) <= {int}:  # the common case: asking the abstract class takes longer than a step
            return text, list(token_ids), cache_salt
        if not all(isinstance(t, Integral) and not isinstance(t, bool) for t in token_ids):
            raise TypeError("prompt_token_ids must be integers; pass text as a string instead")
        return text, [int(t) for t in token_ids], cache_salt

    def _read_dict(self, prompt: dict[str, Any]) -> tuple[Any, Any, str | None]:
        for key, what in _LATER_KEYS.items():
            if prompt.get(key) is not None:
                raise ValueError(f"prompt key {key!r}: {what} are not supported by this model; remove the key")
        unknown = prompt.keys() - _TEXT_KEYS - _LATER_KEYS.keys()
        if unknown:
            raise ValueError(f"unknown prompt keys {sorted(map(str, unknown))}: use {sorted(_TEXT_KEYS)}")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and token_ids is None:
            raise ValueError("a prompt dict needs 'prompt' or 'prompt_token_ids'")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"prompt['prompt'] must be a string, not {type(text).__name__}")
        if token_ids is not None and not _is_sequence(token_ids):
            raise TypeError(f"prompt['prompt_token_ids'] must be a list, not {type(token_ids).__name__}")
        cache_salt = prompt.get("cache_salt")
        if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
            raise TypeError("prompt['cache_salt'] must be a non-empty string")
        for key, value in (("prompt", text), ("cache_salt", cache_salt)):
            if value is not None:
                unicode_text(f"prompt[{key!r}]", value)
        return text, token_ids, cache_salt

    def _tokenize(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: pass prompts as token ids, not as text")
        return list(self.tokenizer.encode(text))

    def _resolve_params(self, params: SamplingParams) -> SamplingParams:
        """A private copy, checked against this model. Further end tokens of the model become stop ids."""
        params = params.clone()
        params.verify()
        if self.further_end_ids and not params.ignore_eos:
            stops = [*(params.stop_token_ids or ()), *self.further_end_ids]
            params.stop_token_ids = list(dict.fromkeys(stops))
        eos = [] if self.eos_token_id is None else [self.eos_token_id]
        params.resolve(
            self.config.vocab_size, [*eos, *self.further_end_ids], self.tokenizer, self.config.max_logprobs
        )
        if self.tokenizer is None:
            params.detokenize = False
        return params

    def _check_tokens(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        if len(token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, which leaves no room to generate within "
                f"max_model_len={self.config.max_model_len}: shorten it, set truncate_prompt_tokens, or raise "
                f"max_model_len"
            )
        highest, lowest = max(token_ids), min(token_ids)
        if lowest < 0 or highest >= self.config.vocab_size:
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"prompt token id {bad} is out of range: the vocabulary has ids 0 to {self.config.vocab_size - 1}"
            )


def _is_sequence(value: Any) -> bool:
    """A list, tuple or one-dimensional array of ids; not text."""
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)
