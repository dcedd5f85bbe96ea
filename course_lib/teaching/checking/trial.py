"""One guarded call of a learner's code.

Invariant: whatever the code does (short of killing the process, or of catching everything at several levels),
the call comes back within its time limit; nothing that it printed, raised or switched outlives it, and the
caller's arguments are untouched. A Ctrl-C passes through.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import io
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import torch

KEPT_CHARACTERS = 2000
RING_AGAIN = 0.02  # seconds between attempts to stop code that catches every exception
# as they were before the first exercise's cell; the rest are Jupyter's, which replaces them for every cell
_PYTHONS_OWN = {name: thing for name, thing in vars(builtins).items()
                if isinstance(thing, type | BuiltinFunctionType)}
_GENERATORS = (random.Random, torch.Generator, np.random.Generator, np.random.RandomState)


class TookTooLong(BaseException):
    """The call was stopped at its time limit. No `Exception`, so that `except Exception` does not keep it."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call.

    `error` is the exception that ended it, or None. `printed` counts the characters that it wrote to stdout,
    of which `output` holds the first 2,000; stderr is dropped, because warnings and progress bars differ from
    run to run. `apart` counts what code of the module named to `attempt` wrote; it is in neither of the two.
    `changed` are the positions and keywords of the arguments that it altered, `replaced` the
    builtins of Python that it replaced or deleted.
    """

    value: Any
    error: BaseException | None
    printed: int
    output: str
    apart: int
    changed: tuple[int | str, ...]
    replaced: tuple[str, ...]


def attempt(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], seconds: float,
            apart: dict[str, Any] | None = None) -> Outcome:
    """Call `function` on deep copies of the arguments, for at most `seconds`; without a limit outside the
    main thread, where no signal arrives. Random numbers start from seed 0, so outcomes repeat.

    `apart` are the globals of a module: what its code prints, or what that calls, is only counted.
    """
    own_args, own_kwargs = copy.deepcopy((args, kwargs))
    written = _Written(apart)
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(_Written()), isolated():
        value, error, replaced = _call(function, own_args, own_kwargs, seconds)
    changed = [i for i, (before, after) in enumerate(zip(args, own_args, strict=True))
               if not _unchanged(before, after)]
    changed += [name for name in kwargs if not _unchanged(kwargs[name], own_kwargs[name])]
    return Outcome(value, error, written.count, written.text, written.apart, tuple(changed), tuple(replaced))


def put_back_builtins() -> list[str]:
    """Undo what a cell did to Python's own functions and types; the names of those that it had replaced."""
    found = vars(builtins).copy()
    vars(builtins).update(_PYTHONS_OWN)  # first, for all that follows may use them
    return sorted(name for name, thing in _PYTHONS_OWN.items() if found.get(name) is not thing)


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Inside, random numbers start from seed 0. Afterwards the random states of Python, numpy and torch
    (CPU), torch's default dtype and device and its grad mode, and numpy's error handling are as they were.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype, grad, errors = torch.get_default_dtype(), torch.is_grad_enabled(), np.geterr()
    device = torch.get_default_device()
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs' generators as well
    try:
        yield
    finally:
        if torch.get_default_device() != device:  # setting it slows all that follows
            torch.set_default_device(None if device.type == "cpu" else device)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        np.seterr(**errors)


def _call(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any],
          seconds: float) -> tuple[Any, BaseException | None, list[str]]:
    """Value, error and replaced builtins of one call, stopped by an alarm that rings until it bites."""
    armed, rings = True, 0
    here, tracer = sys._getframe(), sys.gettrace()

    def ring(_signal: int, frame: Any) -> None:
        nonlocal rings
        if not armed:
            return
        rings += 1
        if rings > 1:  # a bare `except:` caught the last one: raise once more in its handler
            while frame is not None and frame is not here:
                frame.f_trace = bite
                frame = frame.f_back
            sys.settrace(bite)
        raise TookTooLong

    def bite(_frame: Any, event: str, _argument: Any) -> Any:
        if armed and event == "line":
            raise TookTooLong
        return bite

    value, error = None, None
    names, saved = vars(builtins), dict(vars(builtins))
    limited = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if limited:
        handler = signal.signal(signal.SIGALRM, ring)
        timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, RING_AGAIN), RING_AGAIN)
    try:
        try:
            value = function(*args, **kwargs)
        finally:
            armed = False  # a plain assignment, before which no signal can arrive here
            found = names.copy()  # and no use of any builtin before they are back
            names.update(saved)
    except KeyboardInterrupt:
        raise
    except BaseException as raised:
        error = raised
    finally:
        if limited:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler)
        if rings:
            sys.settrace(tracer)
    for name in found.keys() - saved.keys():
        del names[name]
    replaced = sorted(name for name in saved if name not in found or found[name] is not saved[name])
    if rings:  # what the code made of being stopped (it returned, or raised something else) says nothing
        value, error = None, TookTooLong()
    return value, error, replaced


class _Written(io.TextIOBase):
    """A stream that keeps the beginning and counts the rest; of one module's code it only counts."""

    def __init__(self, module: dict[str, Any] | None = None) -> None:
        self.text, self.count, self.apart, self.module = "", 0, 0, module

    def write(self, text: str) -> int:
        size = text.__len__()  # the code that prints may have replaced `len`
        frame = None if self.module is None else sys._getframe(1)
        # up to the guarded call: what called that may be a cell of the module, too
        while frame is not None and frame.f_code is not _call.__code__:
            if frame.f_globals is self.module:
                self.apart += size
                return size
            frame = frame.f_back
        self.count += size
        if self.text.__len__() < KEPT_CHARACTERS:
            self.text = (self.text + text[:KEPT_CHARACTERS])[:KEPT_CHARACTERS]
        return size


def _unchanged(before: Any, after: Any, depth: int = 0) -> bool:
    """Whether two deep copies are still exactly the same; objects by their attributes, 8 levels deep."""
    if depth > 8 or before is after or isinstance(before, _GENERATORS):  # drawing is what a generator is for
        return True
    if type(before) is not type(after):
        return False
    if isinstance(before, torch.Tensor | np.ndarray):
        return (before.shape == after.shape and before.dtype == after.dtype
                and bool(((before == after) | ((before != before) & (after != after))).all()))  # nan is nan
    if isinstance(before, dict):
        return _unchanged(list(before.items()), list(after.items()), depth)
    if isinstance(before, list | tuple | deque):
        return len(before) == len(after) and all(
            _unchanged(a, b, depth + 1) for a, b in zip(before, after, strict=True))
    if isinstance(before, set | frozenset):  # a copy of an object without __eq__ is not equal to it
        plain = [{x for x in elements if type(x).__eq__ is not object.__eq__} for elements in (before, after)]
        return len(before) == len(after) and plain[0] == plain[1]
    attributes, attributes_after = _attributes(before), _attributes(after)
    if attributes or attributes_after:
        return _unchanged(attributes, attributes_after, depth + 1)
    return type(before).__eq__ is object.__eq__ or bool(before == after) or before != before


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return getattr(value, "__dict__", {}) | held
