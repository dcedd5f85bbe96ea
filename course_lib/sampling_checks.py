"""Checks of single values of `SamplingParams`: type, range, and words that become tokens.

Invariant: a value that passes comes back as a plain Python object (numpy scalars become int and
float), and a value that fails raises one sentence naming the argument and what it should be. `bool` is
no number here: `top_k=True` is a mistake.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

MAX_FLOAT32 = 3.4028234e38  # larger numbers become infinite in the sampler


def number(name: str, value: Any, *, low: float | None = None, high: float | None = None,
           above: float | None = None) -> float:
    """A finite float with `low <= value <= high` and `value > above`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    ok = math.isfinite(result) and abs(result) <= MAX_FLOAT32
    ok = ok and (low is None or result >= low) and (high is None or result <= high)
    if not ok or (above is not None and result <= above):
        raise ValueError(f"{name} must be {_range(low, high, above)}, got {value}.")
    return result


def integer(name: str, value: Any, *, low: int, high: int | None = None, note: str = "") -> int:
    """An int in [low, high]; `note` explains special values in the error."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int{note}, got {value!r} ({type(value).__name__}).")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {_range(low, high, None)}{note}, got {value}.")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """True or False (or numpy's)."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__}).")


def unicode_text(name: str, value: str) -> str:
    """`value`, unless it holds half of a surrogate pair: such a string has no bytes, hence no tokens."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode text: character {error.start} is half of a surrogate pair; "
            "decode the text with errors='replace', or remove the character."
        ) from None
    return value


def strings(name: str, value: Any) -> list[str]:
    """None, one string or several -> a list without doubles; the empty string is refused."""
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(s, str) for s in items):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}.")
    if any(not s.strip(" ") if name == "bad_words" else not s for s in items):
        raise ValueError(f"{name} cannot contain an empty string; remove it.")
    return list(dict.fromkeys(unicode_text(name, item) for item in items))


def token_ids(name: str, value: Any) -> list[int]:
    """None or a sequence of non-negative ints -> a list without doubles."""
    items = [] if value is None else value
    if isinstance(items, (str, bytes, Mapping)) or not hasattr(items, "__iter__"):
        raise TypeError(f"{name} must be a list of token ids, got {value!r}.")
    return list(dict.fromkeys(integer(f"every id in {name}", item, low=0) for item in items))


def logit_bias(value: Any, limit: float) -> dict[int, float]:
    """{token id: bias}, ids as int or as digits (OpenAI's JSON), biases clipped to +-limit."""
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must be a dict of token id to bias, got {value!r}.")
    result: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        token = integer("every key of logit_bias", token, low=0, note=" (a token id)")
        if token in result:
            raise ValueError(f"logit_bias names token {token} twice; keep one.")
        result[token] = max(-limit, min(limit, number(f"logit_bias[{token}]", bias)))
    return result


def callables(name: str, value: Any) -> list[Callable]:
    """A list of callables that can be called as logits processors."""
    if not isinstance(value, (list, tuple)) or not all(callable(f) for f in value):
        raise TypeError(f"{name} must be a list of callables, got {value!r}.")
    for function in value:
        processor_arity(name, function)
    return list(value)


def processor_arity(name: str, function: Callable) -> int:
    """How many arguments a logits processor is called with: 3 or 2.

    vLLM's rule is "three parameters: three arguments". Where the signature forbids that (keyword-only
    or further default parameters), the number that fits is taken. Raises TypeError if neither does.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # many built-in functions have none
        signature = None
    if signature is not None:
        for count in (3, 2) if len(signature.parameters) == 3 else (2, 3):
            try:
                signature.bind(*range(count))
            except TypeError:
                continue
            return count
    raise TypeError(
        f"{name} takes functions f(output_ids, logits) or f(prompt_ids, output_ids, logits); "
        f"{function!r:.80} cannot be called so (or has no signature that says it can); wrap it in a function that can."
    )


def tokenize_bad_words(words: Sequence[str], tokenizer: Any, vocab_size: int) -> list[list[int]] | None:
    """vLLM's two variants of each word: as at the start of a text, and as after a space.

    The second counts only if it is a different single start (same length, other first token);
    otherwise it would forbid the bare space token and with it half of the vocabulary.
    """
    if not words:
        return None
    sequences: list[list[int]] = []
    for word in words:
        plain = list(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        spaced = list(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if not plain:
            raise ValueError(f"bad_words entry {word!r} has no tokens in this model's vocabulary; remove it.")
        sequences.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            sequences.append(spaced)
    outside = [t for ids in sequences for t in ids if t >= vocab_size]
    if outside:
        raise ValueError(f"bad_words has tokens outside the model's vocabulary: {outside[:8]}; remove them.")
    return sequences


def _range(low: float | None, high: float | None, above: float | None) -> str:
    if above is not None:
        return f"in ({above:g}, {high:g}]" if high is not None else f"a finite number above {above:g}"
    if high is not None:
        return f"in [{low:g}, {high:g}]" if isinstance(high, float) else f"from {low} to {high}"
    return f"at least {low:g} and finite" if isinstance(low, float) else (
        "a finite number" if low is None else f"at least {low}")
