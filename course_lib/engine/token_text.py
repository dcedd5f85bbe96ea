"""Token ids to text, piece by piece.

Owns the two ways of turning a growing list of token ids into text without ever giving out half a
character:

- `ByteStream` for byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM): there a token *is* a string of
  bytes, so decoding is concatenation and an incremental UTF-8 decoder does the rest;
- `WindowStream` for all others (SentencePiece with spaces and byte fallback, WordPiece, slow
  tokenizers), whose text depends on the neighbours: decode a short window with and without the new
  token, the difference is new.

Invariant: for text that is valid UTF-8 the pieces concatenated equal decode(prompt + output) less
decode(prompt), so an output begins with its space. `WindowStream` shows a run of byte tokens as soon as
it is whole; if the run turns out invalid later, a full decode would show it differently.

vLLM: `FastIncrementalDetokenizer` (the tokenizers library's `DecodeStream`, 1 us a token but it raises
"Invalid prefix" on some byte runs) and `vllm/tokenizers/detokenizer_utils.py` (windows).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

REPLACEMENT = "\ufffd"
PROMPT_TAIL = 7  # prompt tokens that give the first output token its context (vLLM: 5 + 2)
MAX_PENDING = 16  # a character has at most 4 bytes: past this a trailing U+FFFD will not become one
_CACHE_ATTRIBUTE = "_course_lib_pieces"


class TextStream(Protocol):
    """Turns tokens into text as they come."""

    def step(self, token_id: int) -> str:
        """Text that is certain with this token; "" while a character is incomplete."""

    def flush(self) -> str:
        """What is still pending, as a full decode shows it (U+FFFD for half a character)."""


class TokenPieces(dict[int, bytes]):
    """Bytes of each token of a byte-level tokenizer, looked up once: {token id: bytes}.

    Unknown ids have none, as in `tokenizer.decode`.
    """

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        self._byte_of = _byte_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) or ""
        try:
            data = bytes(self._byte_of[char] for char in piece)
        except KeyError:  # an added token in plain characters
            data = piece.encode("utf-8", "replace")
        self[token_id] = data
        return data


class TokenizerText:
    """What the streams of one tokenizer share; kept on the tokenizer, so that it lives as long."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.pieces: TokenPieces | None = None
        self._texts: dict[int, str] = {}
        if self.backend is None:
            self.special_ids = frozenset(tokenizer.all_special_ids)
            return
        from tokenizers.decoders import ByteLevel

        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        if isinstance(self.backend.decoder, ByteLevel):
            self.pieces = TokenPieces(self.backend)

    @classmethod
    def of(cls, tokenizer: Any) -> TokenizerText:
        """The shared part of `tokenizer`, made on first use."""
        shared = getattr(tokenizer, _CACHE_ATTRIBUTE, None)
        if shared is None or shared.tokenizer is not tokenizer:
            shared = cls(tokenizer)
            setattr(tokenizer, _CACHE_ATTRIBUTE, shared)
        return shared

    def stream(self, prompt_token_ids: Sequence[int], skip_special: bool, spaces: bool) -> TextStream:
        """A stream that continues the prompt."""
        if self.pieces is not None:
            return ByteStream(self, prompt_token_ids, skip_special)
        return WindowStream(self, prompt_token_ids, skip_special, spaces)

    def decode(self, token_ids: Sequence[int], skip_special: bool, spaces: bool = True) -> str:
        """Plain decode, without the clean-up of spaces that some tokenizers add."""
        if self.backend is not None:
            return self.backend.decode(list(token_ids), skip_special_tokens=skip_special)
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special,
                                     clean_up_tokenization_spaces=False,
                                     spaces_between_special_tokens=spaces)

    def token_text(self, token_id: int) -> str:
        """One token alone, for logprobs: with its leading space; half a character as the
        vocabulary's piece (such as "<0xE2>")."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode_alone(token_id)
        return text

    def _decode_alone(self, token_id: int) -> str:
        if self.pieces is not None:
            text = self.pieces[token_id].decode("utf-8", "replace")
        else:
            # The second of two keeps the leading space that decoding strips from the first.
            once = self.decode([token_id], skip_special=False)
            text = self.decode([token_id, token_id], skip_special=False)[len(once):]
        if REPLACEMENT not in text:
            return text
        return self.tokenizer.convert_ids_to_tokens([token_id])[0] or ""


class ByteStream:
    """Text of a byte-level tokenizer: an incremental UTF-8 decoder over the tokens' bytes."""

    def __init__(self, shared: TokenizerText, prompt_token_ids: Sequence[int], skip_special: bool) -> None:
        self._pieces = shared.pieces
        self._skipped = shared.special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A prompt may end inside a character, which the output then completes.
        self._in_prompt_character = False
        for token_id in prompt_token_ids[-PROMPT_TAIL:]:
            self.step(token_id)
        self._in_prompt_character = bool(self._decoder.getstate()[0])

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._pieces[token_id])
        return self._after_prompt(text) if text and self._in_prompt_character else text

    def flush(self) -> str:
        text = self._decoder.decode(b"", True)
        return self._after_prompt(text) if self._in_prompt_character else text

    def _after_prompt(self, text: str) -> str:
        """The prompt's half character, if the output did not complete it, belongs to the prompt."""
        self._in_prompt_character = False
        return text.removeprefix(REPLACEMENT)


class WindowStream:
    """Text of any tokenizer: what the new token adds to the decoded text of a short window."""

    def __init__(self, shared: TokenizerText, prompt_token_ids: Sequence[int], skip_special: bool,
                 spaces: bool) -> None:
        self._shared = shared
        self._skip_special = skip_special
        self._spaces = spaces
        self._skipped = shared.special_ids if skip_special else frozenset()
        visible = (t for t in reversed(prompt_token_ids) if t not in self._skipped)
        self._restart([*islice(visible, PROMPT_TAIL)][::-1])

    def step(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_shown
        if (text.endswith(REPLACEMENT) or len(text) <= len(self._shown)) and num_pending <= MAX_PENDING:
            return ""
        new = text[len(self._shown):]
        self._restart(self._window[self._num_shown:])
        return new

    def flush(self) -> str:
        return self._decode(self._window)[len(self._shown):]

    def _restart(self, window: list[int]) -> None:
        """`window` is known text from here on."""
        self._window = window
        self._num_shown = len(window)
        self._shown = self._decode(window)

    def _decode(self, token_ids: list[int]) -> str:
        return self._shared.decode(token_ids, self._skip_special, self._spaces)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: {character: byte}."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
