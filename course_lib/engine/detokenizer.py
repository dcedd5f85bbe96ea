"""The output text of one request, as it grows.

Owns the text so far, the search for stop strings and what may already be shown. Invariants: shown text
is never taken back; no piece ends inside a character; while a stop string could still begin in the
text's last characters, they are held back. Where the text ends does not depend on how it was cut into
tokens: the stop string that is *completed* first wins, of several completed by the same character the
longest.

vLLM: `vllm/v1/engine/detokenizer.py` (in 0.8.5 the first in the list won; since then the one completed first, and
of several completed by the same character the first in the list).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_lib.engine.token_text import TextStream, TokenizerText

if TYPE_CHECKING:
    from course_lib.sampling_params import SamplingParams


class IncrementalDetokenizer:
    """Feed it new token ids with `update`, take text with `get_next_output_text`."""

    def __init__(self, stream: TextStream | None, stop: Sequence[str] = (), *,
                 include_stop_str_in_output: bool = False, min_tokens: int = 0) -> None:
        self.token_ids: list[int] = []
        """Output tokens, up to the one that completed a stop string."""
        self.output_text = ""
        """All text so far, also what is still held back."""
        self._stream = stream  # None: no text wanted
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._held_back = max(map(len, stop), default=1) - 1 if not include_stop_str_in_output else 0
        self._shown = 0

    @classmethod
    def from_request(cls, tokenizer: Any, prompt_token_ids: Sequence[int],
                     params: SamplingParams) -> IncrementalDetokenizer:
        """For a new request; without a tokenizer, or with detokenize=False, the text stays empty."""
        if tokenizer is None or not params.detokenize:
            return cls(None)
        stream = TokenizerText.of(tokenizer).stream(
            prompt_token_ids, params.skip_special_tokens, params.spaces_between_special_tokens)
        return cls(stream, params.stop, min_tokens=params.min_tokens,
                   include_stop_str_in_output=params.include_stop_str_in_output)

    def update(self, new_token_ids: Sequence[int], stop_terminated: bool) -> str | None:
        """Add tokens; return the stop string they complete, or None.

        `stop_terminated`: the last token ended the request (EOS or a stop token); its text is left
        out unless `include_stop_str_in_output`. Tokens after a completed stop string are dropped.
        """
        if self._stream is None:
            self.token_ids.extend(new_token_ids)
            return None
        silent = len(new_token_ids) - 1 if stop_terminated and not self._include_stop else None
        for position, token_id in enumerate(new_token_ids):
            self.token_ids.append(token_id)
            if position == silent:
                break
            new_text = self._stream.step(token_id)
            if not new_text:
                continue
            self.output_text += new_text
            if self._stop and len(self.token_ids) > self._min_tokens:
                found = self._find_stop(len(new_text))
                if found is not None:
                    return found
        return None

    def _find_stop(self, num_new: int) -> str | None:
        """The first stop string that ends in the last `num_new` characters; cuts the text there."""
        text = self.output_text
        first_end = len(text) - num_new + 1
        best: tuple[int, int, str] | None = None  # end, start, string
        for string in self._stop:
            start = text.find(string, max(0, first_end - len(string)))
            if start >= 0 and (best is None or (start + len(string), start) < best[:2]):
                best = (start + len(string), start, string)
        if best is None:
            return None
        end, start, string = best
        self.output_text = text[: end if self._include_stop else start]
        self._stream = None  # the text is final
        return string

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        """Text to show: with `delta` what is new since the last such call, otherwise all of it.

        `finished`: no more tokens will come, so what was held back is given out as well.
        """
        if finished and self._stream is not None:
            self.output_text += self._stream.flush()
            self._stream = None
        end = len(self.output_text) if finished else max(0, len(self.output_text) - self._held_back)
        if not delta:
            return self.output_text[:end]
        start, self._shown = self._shown, max(self._shown, end)
        return self.output_text[start:end]
