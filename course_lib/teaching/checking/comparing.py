"""Whether a result equals the expected one, and if not, what the difference is in a sentence.

Invariant: only the expected value's structure is walked, so the comparison ends for any result. Numbers of
floating point agree within rtol 1e-4 and atol 1e-5 (wider for 16-bit types, whose own rounding is coarser);
everything else, and every type and shape, must agree exactly.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from course_lib.teaching.checking.describing import describe, error_name, kind_of

RTOL, ATOL = 1e-4, 1e-5


@dataclass(frozen=True)
class Difference:
    """`of_type`: a type, dtype, device or shape is wrong, rather than a value. `sentence` says which."""

    of_type: bool
    sentence: str


def difference(got: Any, expected: Any) -> Difference | None:
    """The first difference, or None. A list equals a tuple; 0-d tensors and numpy scalars are numbers."""
    try:
        return _difference(got, expected, "The result")
    except Exception as error:  # a result with methods of its own, which fail
        return Difference(False, f"The result could not be compared: it is {kind_of(got)}, whose comparison "
                                 f"raised {error_name(error)}.")


def _difference(got: Any, expected: Any, name: str) -> Difference | None:
    if got is None and expected is not None:
        missing = "Your code returned None" if name == "The result" else f"{name} is None"
        return Difference(True, f"{missing} instead of {kind_of(expected)}: is a `return` missing?")
    if isinstance(expected, torch.Tensor | np.ndarray):
        return _array_difference(got, expected, name)
    got, expected = _plain(got), _plain(expected)
    if isinstance(expected, list | tuple):
        return _sequence_difference(got, expected, name)
    if isinstance(expected, dict):
        return _dict_difference(got, expected, name)
    if not _same_type(got, expected):
        return _wrong_type(got, expected, name)
    if isinstance(expected, float):
        return None if _close(float(got), expected) else _wrong_value(got, expected, name)
    return None if got is expected or bool(got == expected) else _wrong_value(got, expected, name)


def _plain(value: Any) -> Any:
    """Python's number for a numpy scalar or a 0-d tensor, else the value itself."""
    zero_d = isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0
    return value.item() if zero_d or isinstance(value, np.generic) else value


def _same_type(got: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(got, int | float) and not isinstance(got, bool)
    if isinstance(expected, int):
        return isinstance(got, int) and isinstance(got, bool) == isinstance(expected, bool)
    if isinstance(expected, set | frozenset):
        return isinstance(got, set | frozenset)
    return isinstance(got, type(expected))


def _close(got: float, expected: float) -> bool:
    both_nan = math.isnan(got) and math.isnan(expected)
    return both_nan or math.isclose(got, expected, rel_tol=RTOL, abs_tol=ATOL)


def _wrong_value(got: Any, expected: Any, name: str) -> Difference:
    ours, theirs = describe(got), describe(expected)
    if ours == theirs and isinstance(got, set | frozenset):  # they differ in what is not shown
        return Difference(False, f"{name} lacks {describe(expected - got)}, and should not have "
                                 f"{describe(got - expected)}.")
    if ours == theirs and isinstance(got, str | bytes):
        at = next((i for i, pair in enumerate(zip(got, expected, strict=False)) if len(set(pair)) > 1),
                  min(len(got), len(expected)))
        name = f"{name}, from its character {at} on,"
        ours, theirs = (describe(text[at:at + 40]) for text in (got, expected))
    return Difference(False, f"{name} is {ours}, it should be {theirs}.")


def _wrong_type(got: Any, expected: Any, name: str) -> Difference:
    remedy = _remedy(got, expected)
    return Difference(True, f"{name} is {kind_of(got)}, it should be {kind_of(expected)}"
                            + (f": {remedy}." if remedy else "."))


def _remedy(got: Any, expected: Any) -> str:
    """How to make what is needed of what came; "" when there is no usual way."""
    listed = isinstance(got, list | tuple)
    if isinstance(expected, torch.Tensor):
        if isinstance(got, np.ndarray):
            return "convert it with torch.from_numpy(x)"
        if listed and got and isinstance(got[0], torch.Tensor):
            return "put its tensors together with torch.stack(x) or torch.cat(x)"
        return "convert it with torch.tensor(x)" if listed or isinstance(got, int | float) else ""
    if isinstance(expected, np.ndarray):
        return ("convert it with x.numpy()" if isinstance(got, torch.Tensor) else
                "convert it with np.array(x)" if listed or isinstance(got, int | float) else "")
    if isinstance(got, torch.Tensor | np.ndarray):
        return ("convert it with x.tolist()" if isinstance(expected, list | tuple) else
                "take its one number with x.item()" if isinstance(expected, int | float) else "")
    if isinstance(expected, list | tuple):
        made = isinstance(got, set | frozenset | deque | range) or hasattr(got, "__next__")
        return "convert it with list(x)" if made else ""
    if isinstance(expected, set | frozenset):
        return "convert it with set(x)" if listed else ""
    if isinstance(expected, bool):
        return "convert it with bool(x)" if isinstance(got, int) else ""
    if isinstance(expected, int):
        return ("divide with // instead of /, or convert it with int(x)" if isinstance(got, float) else
                "convert it with int(x)" if isinstance(got, bool | str) else "")
    if isinstance(expected, str):
        return ('join its pieces with "".join(x)' if listed else "convert it with x.decode()"
                if isinstance(got, bytes) else "")
    return ""


def _sequence_difference(got: Any, expected: Any, name: str) -> Difference | None:
    if not isinstance(got, list | tuple):
        return _wrong_type(got, expected, name)
    path = "result" if name == "The result" else name.strip("`")
    pairs = enumerate(zip(got, expected, strict=len(got) == len(expected)))
    found = (_difference(one, other, f"`{path}[{i}]`") for i, (one, other) in pairs)
    first = next(filter(None, found), None)
    if len(got) == len(expected):
        return first
    sizes = f"{name} has {_elements(len(got))}, it should have {len(expected):,}."
    return Difference(False, sizes if first is None else f"{sizes} {first.sentence}")


def _dict_difference(got: Any, expected: dict, name: str) -> Difference | None:
    if not isinstance(got, dict):
        return _wrong_type(got, expected, name)
    for these, those, verb in ((expected, got, "lacks the"), (got, expected, "has an unexpected")):
        if extra := [key for key in these if key not in those]:
            return Difference(False, f"{name} {verb} key {describe(extra[0])}.")
    path = "result" if name == "The result" else name.strip("`")
    for key in expected:
        if found := _difference(got[key], expected[key], f"`{path}[{describe(key)}]`"):
            return found
    return None


def _array_difference(got: Any, expected: torch.Tensor | np.ndarray, name: str) -> Difference | None:
    tensor = isinstance(expected, torch.Tensor)
    if not isinstance(got, torch.Tensor if tensor else np.ndarray):
        return _wrong_type(got, expected, name)
    wrong = []
    if got.shape != expected.shape:
        wrong.append(f"its shape is {list(got.shape)}, it should be {list(expected.shape)}")
    if got.dtype != expected.dtype:
        remedy = f"x.to({expected.dtype})" if tensor else f"x.astype(np.{expected.dtype})"
        ours, theirs = (str(x.dtype).removeprefix("torch.") for x in (got, expected))
        wrong.append(f"its dtype is {ours}, it should be {theirs} (convert it with {remedy})")
    if tensor and got.device.type != expected.device.type:
        wrong.append(f"it is on the device {got.device}, it should be on {expected.device}")
    if tensor and got.layout != expected.layout:
        wrong.append(f"its layout is {got.layout}, it should be {expected.layout}")
    if wrong:
        return Difference(True, f"{name} is not of the right form: {'; '.join(wrong)}.")
    ours, theirs, rtol = _values(got), _values(expected), RTOL
    if tensor and expected.is_floating_point():
        rtol = max(RTOL, 4 * torch.finfo(expected.dtype).eps)
    floating = theirs.dtype.kind in "fc"
    same = np.isclose(ours, theirs, rtol, ATOL, equal_nan=True) if floating else ours == theirs
    if np.all(same):
        return None
    first = np.argwhere(~same)[0].tolist()
    one, other = (describe(_plain(values[tuple(first)])) for values in (ours, theirs))
    if not first:
        return Difference(False, f"{name} is {one}, it should be {other}.")
    return Difference(False, f"{np.sum(~same):,} of {_elements(same.size)} of {name[0].lower() + name[1:]} "
                             f"{'is' if np.sum(~same) == 1 else 'are'} wrong. "
                             f"The first is at {first}: yours is {one}, it should be {other}.")


def _values(array: torch.Tensor | np.ndarray) -> np.ndarray:
    """As a numpy array that can be compared: numpy has no bfloat16."""
    if isinstance(array, np.ndarray):
        return array
    array = array.detach().cpu().resolve_conj().resolve_neg()
    wide = (torch.complex128 if array.is_complex() else torch.float64 if array.is_floating_point() else
            array.dtype if array.dtype == torch.bool else torch.int64)
    return array.to(wide).numpy()


def _elements(count: int) -> str:
    return f"{count:,} element" + ("" if count == 1 else "s")
