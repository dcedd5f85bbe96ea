"""One call of a learner's code, whatever it does: it ends, and the notebook is as it was."""

from __future__ import annotations

import builtins
import os
import random
import signal
import sys
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch

from course_lib.teaching.checking.counting import count_torch_calls
from course_lib.teaching.checking.trial import TookTooLong, attempt


class Node:
    def __init__(self, value):
        self.value, self.other = value, self


class Slotted:
    __slots__ = ("value", "unset")

    def __init__(self, value):
        self.value = value


def run(function, *args, seconds=2.0, **kwargs):
    return attempt(function, args, kwargs, seconds)


def endless():
    while True:
        pass


def endless_in_except():
    while True:
        try:
            int("x")
        except Exception:
            pass


def endless_in_bare_except():
    while True:
        try:
            time.sleep(10)
        except:  # noqa: E722
            pass


def endless_in_finally():
    while True:
        try:
            time.sleep(10)
        finally:
            continue


def answers_when_stopped():
    try:
        time.sleep(10)
    except:  # noqa: E722
        return "an answer"


def waits_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.parametrize("function", [endless, endless_in_except, endless_in_bare_except, endless_in_finally,
                                      answers_when_stopped, waits_for_a_lock])
def test_code_that_does_not_end_is_stopped(function):
    def tracer(*_):
        return None

    handler, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        outcome = run(function, seconds=0.1)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert isinstance(outcome.error, TookTooLong) and outcome.value is None
    assert time.monotonic() - start < 5
    time.sleep(0.05)  # no alarm rings any more
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_code_that_catches_exceptions_does_not_notice_the_stop():
    caught = []

    def waits():
        try:
            time.sleep(10)
        except Exception:
            caught.append(True)
    run(waits, seconds=0.1)
    assert not caught


def test_a_ctrl_c_passes_through_and_leaves_all_as_it_was():
    def interrupted():
        torch.set_grad_enabled(False)
        os.kill(os.getpid(), signal.SIGINT)
        endless()

    stdout, handler = sys.stdout, signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    assert sys.stdout is stdout and torch.is_grad_enabled() and signal.getsignal(signal.SIGALRM) is handler


def test_a_call_outside_the_main_thread_has_no_limit_but_works():
    found = []
    thread = threading.Thread(target=lambda: found.append(run(lambda x: x + 1, 1)))
    thread.start()
    thread.join()
    assert found[0].value == 2


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), GeneratorExit(), MemoryError()])
def test_an_exception_is_kept(error):
    def raises():
        raise error
    assert run(raises).error is error


def test_endless_recursion_is_an_exception_like_others():
    def again():
        return again()
    assert isinstance(run(again).error, RecursionError)


def test_output_is_captured_and_bounded(capfd):
    def prints():
        print("a" * 1500)
        print("b" * 10_000_000, file=sys.stderr)
        print("c" * 10_000_000)
        for _ in range(10):
            print("d", end="", flush=True)
    outcome = run(prints)
    assert outcome.printed == 1501 + 10_000_001 + 10
    assert outcome.output == "a" * 1500 + "\n" + "c" * 499
    assert capfd.readouterr() == ("", "")


def test_what_one_module_prints_is_counted_apart():
    module = {"show": print}
    exec("def chatty(shown):\n    print('a' * 5_000)\n    show(shown)\n    return len", module)

    def look():
        print("before")
        module["chatty"]("through another")
        print("after")
    outcome = attempt(look, (), {}, 2.0, apart=module)
    assert (outcome.output, outcome.printed, outcome.apart) == ("before\nafter\n", 13, 5_001 + 16)
    assert run(look).apart == 0
    module |= {"attempt": attempt, "look": look}
    exec("outcome = attempt(look, (), {}, 2.0, apart=globals())", module)  # as a cell calls `check`
    assert module["outcome"] == outcome


def test_a_closed_or_replaced_stdout_is_put_back():
    def closes():
        sys.stdout.close()
        sys.stdout = None
    stdout = sys.stdout
    run(closes)
    assert sys.stdout is stdout
    print("still open")


def test_builtins_are_put_back():
    def replaces():
        builtins.sum = builtins.len = lambda *_: 5
        builtins.invented = 1
        print("four")
        del builtins.max
        return sum([1, 2]), len([])
    saved = dict(vars(builtins))
    outcome = run(replaces)
    assert outcome.value == (5, 5) and outcome.printed == 5
    assert outcome.replaced == ("len", "max", "sum")
    assert vars(builtins) == saved


def test_even_all_of_them():
    def clears():
        vars(builtins).clear()
        raise_something  # noqa: B018, F821
    outcome = run(clears)
    assert isinstance(outcome.error, NameError) and "BaseException" in outcome.replaced


def test_switches_and_random_states_are_put_back():
    def switches():
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        np.seterr(all="raise")
        return random.random(), np.random.random(), torch.rand(1, device="cpu").item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    expected = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    errors = np.geterr()
    first = run(switches)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == expected
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and np.geterr() == errors
    assert run(switches).value == first.value  # its random numbers are the same ones every time


@pytest.mark.parametrize(("argument", "change"), [
    (torch.tensor([1.0, float("nan")]), lambda x: x[0].add_(1e-6)),
    (torch.tensor([1, 2]), lambda x: x.resize_(1)),
    (torch.tensor([True]), lambda x: x.logical_not_()),
    (np.array([1.0, np.nan]), lambda x: x.fill(0)),
    ([1, [2, 3]], lambda x: x[1].append(4)),
    ([1, 2], lambda x: x.reverse()),
    ({"a": {1}}, lambda x: x["a"].add(2)),
    ({"a": 1, "b": 2}, lambda x: x.pop("a")),
    (deque([1, 2]), lambda x: x.rotate(1)),
    (deque([Node(1)]), lambda x: x.pop()),
    ({Node(1), 2}, lambda x: x.remove(2)),
    ({Node(1): 2}, lambda x: x.clear()),
    ([Node(1)], lambda x: setattr(x[0], "value", 2)),
    (Slotted([1]), lambda x: x.value.clear()),
    (Slotted(1), lambda x: setattr(x, "unset", 1)),
    (bytearray(b"ab"), lambda x: x.pop()),
])
def test_a_changed_argument_is_seen_and_the_callers_own_is_untouched(argument, change):
    assert run(lambda *_, **__: None, argument, key=argument).changed == ()
    assert run(lambda _, x: change(x), 0, argument).changed == (1,)
    assert run(lambda x: change(x), x=argument).changed == ("x",)
    assert run(lambda x: None, argument).changed == ()
    assert run(lambda x: x, argument).value is not argument


def test_drawing_from_a_generator_changes_no_argument():
    generators = random.Random(0), torch.Generator().manual_seed(0), np.random.default_rng(0)
    outcome = run(lambda a, b, c: (a.gauss(0, 1), torch.rand(1, generator=b).item(), c.random()), *generators)
    assert outcome.error is None and outcome.changed == ()


def test_count_torch_calls_counts_primitive_operations():
    counts = count_torch_calls(lambda x, times: [x.sort() for _ in range(times)] + [x @ x, x.add_(1)],
                               torch.eye(3), times=2)
    assert (counts["sort"], counts["mm"], counts["add_"], counts["topk"]) == (2, 1, 1, 0)
    with pytest.raises(ZeroDivisionError):
        count_torch_calls(lambda: 1 / 0)
