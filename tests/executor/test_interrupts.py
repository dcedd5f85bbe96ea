"""Ctrl-C, put off."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from course_lib.executor.interrupts import uninterrupted


def test_ctrl_c_takes_effect_at_the_end() -> None:
    handler = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
        done.append("never")
    assert done == ["all of it"] and signal.getsignal(signal.SIGINT) is handler


def test_elsewhere_than_in_the_main_thread_nothing_is_changed() -> None:
    seen = []

    def run() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
