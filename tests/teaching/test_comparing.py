"""What counts as equal, what is told when it is not, and how values are shown."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from fractions import Fraction

import numpy as np
import pytest
import torch

from course_lib.teaching.checking.comparing import difference
from course_lib.teaching.checking.describing import describe, describe_error

INF, NAN = float("inf"), float("nan")
T, A = torch.tensor, np.array


@pytest.mark.parametrize(("got", "expected"), [
    (T([1.0, NAN, -INF]), T([1.00001, NAN, -INF])),
    (T([1e-6]), T([0.0])),
    (T([1, 2]), T([1, 2])),
    (torch.zeros(0, 3), torch.zeros(0, 3)),
    (T(1.0, requires_grad=True), T(1.0)),
    (T([1.0], dtype=torch.bfloat16), T([1.0078125], dtype=torch.bfloat16)),  # neighbours in bfloat16
    (T([1 + 1j], dtype=torch.complex128).conj(), T([1 - 1j], dtype=torch.complex128)),
    (T([1 + 1j], dtype=torch.complex128).conj().imag, T([-1.0], dtype=torch.float64)),
    (A([1.0, NAN]), A([1.0, NAN])),
    (A(["a"]), A(["a"])),
    (np.int64(3), 3), (T(3), 3), (3, T(3).item()), (3, np.int32(3)),
    (0, 0.0), (np.float32(0.1), 0.1), (T(0.1), 0.1), (NAN, NAN), (-INF, -INF),
    (np.bool_(True), True), (T(True), True),
    ("a", "a"), (None, None), ((1, [2.0]), [1, (2.0,)]), ({"a": T([1])}, {"a": T([1])}),
    (frozenset({1}), {1}), (torch.float32, torch.float32), (10 ** 400, 10 ** 400),
])
def test_equal(got, expected):
    assert difference(got, expected) is None


@pytest.mark.parametrize(("got", "expected", "sentence"), [
    (T([1.0, 2.0, 9.0]), T([1.0, 2.5, 3.0]),
     "2 of 3 elements of the result are wrong. The first is at [1]: yours is 2.0, it should be 2.5."),
    (T([[1.0, 0.0]]), T([[1.0, -INF]]),
     "1 of 2 elements of the result is wrong. The first is at [0, 1]: yours is 0.0, it should be -inf."),
    (T([INF]), T([-INF]), "yours is inf, it should be -inf."),
    (T([NAN]), T([1.0]), "yours is nan"),
    (T([2 ** 60 + 1]), T([2 ** 60]), "yours is 1152921504606846977, it should be 1152921504606846976."),
    (T([True]), T([False]), "yours is True, it should be False."),
    (A(["a"]), A(["b"]), "yours is 'a', it should be 'b'."),
    (T(1.0), T(2.0), "The result is 1.0, it should be 2.0."),
    (1.0, 1.0002, "The result is 1.0, it should be 1.0002."),
    (T([1j]), T([1.0 + 0j]), "yours is 0+1j, it should be 1+0j."),
    (3, 4, "The result is 3, it should be 4."),
    ("a", "b", "The result is 'a', it should be 'b'."),
    ([1, 2], [1, 2, 3], "The result has 2 elements, it should have 3."),
    ([1, 3], [1, 2, 3], "The result has 2 elements, it should have 3. `result[1]` is 3, it should be 2."),
    ([{"a": "x" * 90 + "b"}], [{"a": "x" * 90 + "c"}],
     "`result[0]['a']`, from its character 90 on, is 'b', it should be 'c'."),
    ("x" * 90, "x" * 90 + "y", "The result is 'xxx"),  # their lengths are shown
    (set(range(30)) | {40}, set(range(30)) | {41}, "The result lacks {41}, and should not have {40}."),
    ([[1], [2]], [[1], [3]], "`result[1][0]` is 2, it should be 3."),
    ({"a": [1]}, {"a": [2]}, "`result['a'][0]` is 1, it should be 2."),
    ({"a": 1}, {"a": 1, "b": 2}, "The result lacks the key 'b'."),
    ({"a": 1, "b": 2}, {"a": 1}, "The result has an unexpected key 'b'."),
    ([T([1, 2])], [T([1, 3])], "1 of 2 elements of `result[0]` is wrong."),
    ({1}, {2}, "The result is {1}, it should be {2}."),
])
def test_another_value(got, expected, sentence):
    found = difference(got, expected)
    assert not found.of_type and sentence in found.sentence


@pytest.mark.parametrize(("got", "expected", "sentence"), [
    (None, 3, "Your code returned None instead of an int: is a `return` missing?"),
    ([1, None], [1, 2], "`result[1]` is None instead of an int"),
    (A([1.0]), T([1.0]), "is a numpy array, it should be a torch tensor: convert it with torch.from_num"),
    ([1.0], T([1.0]), "is a list, it should be a torch tensor: convert it with torch.tensor(x)."),
    ((T([1.0]),), T([[1.0]]), "torch.stack(x)"),
    (1.0, T(1.0), "is a float, it should be a torch tensor"),
    (T([1.0]), A([1.0]), "it should be a numpy array: convert it with x.numpy()."),
    (T([[1.0]]), T([1.0]), "its shape is [1, 1], it should be [1]."),
    (T([1.0]), T([1]), "its dtype is float32, it should be int64 (convert it with x.to(torch.int64))."),
    (T([[1]]), T([1.0]), "its shape is [1, 1], it should be [1]; its dtype is int64"),
    (torch.ones(1, device="meta"), T([1.0]), "it is on the device meta, it should be on cpu."),
    (torch.ones(1).to_sparse(), T([1.0]), "its layout is torch.sparse_coo"),
    (A([1]), A([1.0]), "convert it with x.astype(np.float64)"),
    (3.0, 3, "is a float, it should be an int: divide with // instead of /, or convert it with int(x)."),
    (True, 1, "is a bool, it should be an int"),
    (1, True, "is an int, it should be a bool: convert it with bool(x)."),
    (True, 1.0, "is a bool, it should be a float."),
    (T([3]), 3, "is a torch tensor, it should be an int: take its one number with x.item()."),
    (T([1, 2]), [1, 2], "convert it with x.tolist()"),
    (range(2), [0, 1], "is a range, it should be a list: convert it with list(x)."),
    ((i for i in [1]), [1], "is a generator, it should be a list: convert it with list(x)."),
    (deque([1]), [1], "is a deque"),
    (["a"], "a", 'join its pieces with "".join(x)'),
    ([1], {1}, "convert it with set(x)"),
    ([1], {"a": 1}, "is a list, it should be a dict."),
    ([[1.0]], [[1]], "`result[0][0]` is a float"),
])
def test_another_type(got, expected, sentence):
    found = difference(got, expected)
    assert found.of_type and sentence in found.sentence


def test_a_result_whose_comparison_fails():
    class Odd(str):
        def __eq__(self, other):
            raise RuntimeError
    assert difference(Odd("a"), "a").sentence == (
        "The result could not be compared: it is an Odd object, whose comparison raised RuntimeError.")


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Pair:
    left: object
    right: object = None


loop: list = [1]
loop.append(loop)
pair = Pair(1)
pair.right = pair


@pytest.mark.parametrize(("value", "text"), [
    (0.1 + 0.2, "0.3"), (2.0, "2.0"), (1 / 3, "0.33333"), (-INF, "-inf"), (NAN, "nan"), (1e6, "1000000.0"),
    (True, "True"), (None, "None"), (10 ** 5000, "an int of 16,610 bits"), (np.float32(0.5), "0.5"),
    ("it's", '"it\'s"'), ("x" * 10_000_000, f"'{'x' * 60}'… (10,000,000 characters)"),
    ([1, (2,), {"a": {3}}, set(), {}], "[1, (2,), {'a': {3}}, set(), {}]"),
    (list(range(10 ** 6)), "[0, 1, 2, 3, 4, 5, 6, 7, …] (1,000,000 elements)"),
    ({"c", "a", "b"}, "{'a', 'b', 'c'}"), ({10, 9, "a"}, "{9, 10, 'a'}"),
    (set(range(20_000)), "a set of 20,000 elements"),
    (loop, "[1, [1, [1, […]]]]"),
    (pair, "Pair(left=1, right=Pair(left=1, right=Pair(left=1, right=a Pair object)))"),
    (Fraction(1, 2), "a Fraction object"), (object(), "an object"), (Colour.RED, "Colour.RED"),
    (describe, "the function describe"), (Pair, "the class Pair"), (torch.float32, "torch.float32"),
    (T([1.0, 0.25]), "[1.0, 0.25] (float32, shape [2])"),
    (T(3), "3 (int64, shape [])"),
    (torch.zeros(99, 1, dtype=int), "[[0], [0], [0], [0], [0], [0], [0], [0], …] (int64, shape [99, 1])"),
    (torch.zeros(0, 2), "[] (float32, shape [0, 2])"),
    (torch.ones(2, device="meta"), "a torch tensor without values (float32, shape [2] on meta)"),
    ([T([True])], "[tensor([True])]"), (A([1]), "[1] (int64, shape [1], a numpy array)"),
], ids=lambda value: type(value).__name__)
def test_describe(value, text):
    assert describe(value) == text


def test_describe_is_one_short_line_whatever_comes():
    class Odd(list):
        def __iter__(self):
            raise RuntimeError
    assert describe(Odd([1])) == "an Odd object"
    assert describe(torch.full((50, 50, 50), 1 / 3)).endswith("0.33333,  … (float32, shape [50, 50, 50])")
    assert describe(["a" * 50] * 50).endswith(" …, …] (50 elements)")
    for value in (torch.rand(50, 50, 50), ["a\n" * 30] * 16, [["x"] * 16] * 16):
        assert len(describe(value)) <= 160 and "\n" not in describe(value)


def test_describe_error_is_short_and_has_no_address():
    error = AttributeError(f"{object()!r} has no attribute 'x'\nC++ stack")
    assert describe_error(error) == "AttributeError: <object object> has no attribute 'x'"
    assert len(describe_error(ValueError("x" * 10_000))) < 250

    class Odd(Exception):
        def __str__(self):
            raise RuntimeError
    assert describe_error(Odd()) == "Odd"


def test_a_private_exception_is_described_without_its_name():
    class _Lookup(KeyError):
        def __str__(self):
            return self.args[0]

    class _Odd(_Lookup):
        def __str__(self):
            raise RuntimeError
    assert describe_error(_Lookup("300 steps, and no end")) == "300 steps, and no end"
    assert describe_error(_Lookup("")) == describe_error(_Odd()) == "KeyError"
