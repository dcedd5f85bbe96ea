"""Loading a tokenizer, once, with errors that say what is missing."""

from __future__ import annotations

from typing import Any

from course_lib.config import ModelConfig
from course_lib.errors import CorruptModelError


def load_tokenizer(config: ModelConfig) -> Any | None:
    """The Hugging Face tokenizer (`PreTrainedTokenizerBase`), or None under `skip_tokenizer_init`.

    Code that lies beside it is never run (and nobody is asked whether it may).

    Raises CorruptModelError if there is none or it cannot be read.
    """
    if config.skip_tokenizer_init:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.tokenizer_path, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds, also bare Exception, for a broken file
        raise CorruptModelError(
            f"no usable tokenizer in {config.tokenizer_path} ({error}): pass tokenizer=<folder or id>, or "
            f"skip_tokenizer_init=True and prompts as token ids"
        ) from error
