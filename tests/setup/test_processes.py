"""Child processes, the lock, the question put to PyTorch's index: no hang, nothing left behind."""

from __future__ import annotations

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from course_lib.bootstrap import torch_index
from course_lib.bootstrap.lock import exclusive_lock
from course_lib.bootstrap.places import REPO_ROOT, REQUIREMENTS
from course_lib.bootstrap.process import run

PARENT = """
import sys
from course_lib.bootstrap import process
from course_lib.bootstrap.process import raise_on_sigterm, run
process.PATIENCE_S = 0.1
raise_on_sigterm()
child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
try:
    run([sys.executable, "-S", "-c", child])
except KeyboardInterrupt:
    sys.exit(130)
"""


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_us_stops_the_child(number, status):
    """The signal goes to the parent only, the harder case: Ctrl-C in a terminal reaches both."""
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", PARENT],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    child = int(parent.stdout.readline())
    parent.send_signal(number)
    assert parent.wait(timeout=15) == status
    assert not _alive(child)


def test_output_goes_to_the_file(tmp_path):
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run([sys.executable, "-S", "-c", script], output=tmp_path / "log") == 3
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_second_set_up_waits_for_the_first(tmp_path, capfd):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            f"""
import pathlib, time
from course_lib.bootstrap.lock import exclusive_lock
with exclusive_lock(pathlib.Path({str(tmp_path / 'lock')!r}), ""):
    print("held", flush=True); time.sleep(0.5)
""",
        ],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with exclusive_lock(tmp_path / "lock", "waiting"):
        waited_s = time.monotonic() - start
    holder.wait()
    assert waited_s > 0.2 and "waiting" in capfd.readouterr().out


def test_lock_of_a_killed_process_is_free(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            f"""
import pathlib, time
from course_lib.bootstrap.lock import exclusive_lock
with exclusive_lock(pathlib.Path({str(tmp_path / 'lock')!r}), ""):
    print("held", flush=True); time.sleep(60)
""",
        ],
        cwd=REPO_ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    with exclusive_lock(tmp_path / "lock", "waiting"):
        pass


@pytest.fixture
def index():
    """A local stand-in for the index of CPU builds; returns (its address, the page it serves)."""
    page = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write("".join(page).encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", page
        server.shutdown()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_index_with_the_pinned_wheel_is_used(index, no_proxy):
    address, page = index
    tag = "cp%d%d" % sys.version_info[:2]
    page.append(f'<a href="torch-{torch_index.pinned_torch()}%2Bcpu-{tag}-{tag}-manylinux_2_28_x86_64.whl">')
    assert torch_index.cpu_index_answers(address)


def test_index_without_the_pinned_wheel_is_not_used(index, no_proxy):
    address, page = index
    page.append('<a href="torch-1.0.0%2Bcpu-cp39-cp39-linux_x86_64.whl">')
    assert not torch_index.cpu_index_answers(address)


def test_silent_index_costs_no_more_than_the_limit(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert not torch_index.cpu_index_answers(f"http://127.0.0.1:{silent.getsockname()[1]}", limit_s=1.0)
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("platform", "gpu", "no_index", "answers", "used"),
    [
        ("linux", False, "", True, True),
        ("linux", False, "", False, False),
        ("linux", True, "", True, False),
        ("linux", False, "1", True, False),
        ("darwin", False, "", True, False),
    ],
)
def test_when_the_cpu_index_is_passed_to_pip(monkeypatch, platform, gpu, no_index, answers, used):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(torch_index, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(torch_index, "cpu_index_answers", lambda: answers)
    monkeypatch.setenv("PIP_NO_INDEX", no_index)
    assert bool(torch_index.torch_arguments(say=lambda text: None)) == used


def test_pinned_torch_is_read_from_the_requirements(tmp_path):
    assert f"torch=={torch_index.pinned_torch()}\n" in REQUIREMENTS.read_text()
    (tmp_path / "requirements.txt").write_text("numpy==1\n")
    with pytest.raises(ValueError, match="pins no torch"):
        torch_index.pinned_torch(tmp_path / "requirements.txt")
