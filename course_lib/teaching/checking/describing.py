"""Values as short text for a learner: what was expected, what came.

Invariant: the text is one line of at most `limit` characters and says the same on every machine: numbers
rounded to five digits, no memory addresses. It is found quickly, however large the value.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import re
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

SHOWN = 8  # elements of a sequence, or of each dimension of a tensor
DEPTH = 3
CONTENT = 100  # characters of elements


def describe(value: Any, limit: int = 160) -> str:
    """One line about any value."""
    try:
        text = _text(value, 0)
    except Exception:  # the value is of the learner's making: its own methods may fail
        text = kind_of(value)
    return _cut(text, limit)


def kind_of(value: Any) -> str:
    """"a list", "an int", "a numpy array", "a Request object", …"""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return "a torch tensor"
    if isinstance(value, np.ndarray):
        return "a numpy array"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value)
    article = "an" if kind.__name__[:1].lower() in "aeio" else "a"
    known = kind.__module__ in ("builtins", "collections", "numpy")
    return f"{article} {kind.__name__}" + ("" if known else " object")


def describe_error(error: BaseException) -> str:
    """Type and first line of the message; of a private type the message alone."""
    try:
        message = str(error).strip()
    except Exception:
        message = ""
    message = re.sub(r" at 0x[0-9a-fA-F]+", "", message.partition("\n")[0])[:200]
    if message and type(error).__name__.startswith("_"):
        return message
    return f"{error_name(error)}: {message}" if message else error_name(error)


def error_name(error: BaseException) -> str:
    """The name of its type, or of the nearest base with a name that says something: without underscore."""
    return next(kind.__name__ for kind in type(error).__mro__ if not kind.__name__.startswith("_"))


def is_cut(text: str) -> bool:
    """Whether a text of `describe` leaves something of the value out."""
    return "…" in text


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit - 2] + " …"


def _text(value: Any, depth: int) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return _array(value, depth)
    if value is None or value is Ellipsis:
        return str(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, bool | int | float | complex | np.number | np.bool_):
        return _number(value)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 80 else f"{value[:60]!r}… ({len(value):,} characters)"
    if isinstance(value, list | tuple | deque | set | frozenset | dict):
        return _collection(value, depth)
    if isinstance(value, torch.dtype | torch.device | torch.Size | range | slice):
        return str(value)
    if isinstance(value, BaseException):
        return describe_error(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and depth < DEPTH:
        fields = (f"{field.name}={_text(getattr(value, field.name), depth + 1)}"
                  for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if callable(value) and hasattr(value, "__name__") and not isinstance(value, type):
        return f"the function {value.__name__}"
    return kind_of(value)


def _number(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else f"an int of {value.bit_length():,} bits"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return f"{value:.1f}"
    return f"{value:.5g}"


def _collection(value: Any, depth: int) -> str:
    if isinstance(value, tuple):
        opening, closing = "(", ",)" if len(value) == 1 else ")"
    else:
        opening, closing = "{}" if isinstance(value, set | frozenset | dict) else "[]"
    if not value:
        return "set()" if isinstance(value, set | frozenset) else opening + closing
    if depth == DEPTH:
        return f"{opening}…{closing}"
    if isinstance(value, set | frozenset):
        if len(value) > 10_000:
            return f"a set of {len(value):,} elements"
        value = sorted(value, key=_order)
    if isinstance(value, dict):
        return _joined((f"{_text(key, depth + 1)}: {_text(item, depth + 1)}" for key, item in value.items()),
                       len(value), opening, closing)
    return _joined((_text(item, depth + 1) for item in value), len(value), opening, closing)


def _order(value: Any) -> tuple[bool, Any, str]:
    """A sort key for a mixed set: numbers by size, then the rest by its text."""
    number = isinstance(value, int | float)
    return not number, value if number else 0, _text(value, DEPTH)


def _joined(texts: Iterable[str], size: int, opening: str, closing: str) -> str:
    """The first few texts, and how many elements there are when these are not all."""
    if size <= 2 * SHOWN:
        return f"{opening}{', '.join(texts)}{closing}"
    shown = _cut(", ".join(itertools.islice(texts, SHOWN)), CONTENT)  # leaves room for what follows it
    return f"{opening}{shown}, …{closing} ({size:,} elements)"


def _array(value: torch.Tensor | np.ndarray, depth: int) -> str:
    """The first numbers of each dimension; type and shape as well unless it is part of a collection."""
    shape = list(value.shape)
    dtype = str(value.dtype).removeprefix("torch.")
    place = "" if isinstance(value, np.ndarray) or value.device.type == "cpu" else f" on {value.device}"
    about = f"{dtype}, shape {shape}{place}" + (", a numpy array" if isinstance(value, np.ndarray) else "")
    if isinstance(value, torch.Tensor) and value.device.type == "meta":
        return f"a torch tensor without values ({about})"
    shown = value[tuple(slice(0, SHOWN if size > 2 * SHOWN else size) for size in shape)]
    rows = _cut(_rows(shown.tolist(), shape), CONTENT)
    if depth == 0:
        return f"{rows} ({about})"
    return f"tensor({rows})" if isinstance(value, torch.Tensor) else f"array({rows})"


def _rows(values: Any, shape: list[int]) -> str:
    """Nested lists of numbers; `shape` is the whole array's, of which `values` may be the beginning."""
    if not shape:
        return _text(values, DEPTH)
    rest = ", …" if len(values) < shape[0] else ""
    return f"[{', '.join(_rows(row, shape[1:]) for row in values)}{rest}]"
