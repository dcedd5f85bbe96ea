"""A JupyterLab as `lab` starts it, and a browser in front of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.bootstrap.places import REPO_ROOT

START_S = 60
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A Chromium that is installed; without one these tests are skipped, but never in CI."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium is installed: `.ci/run` should have done that")
        pytest.skip("no Chromium is installed: on Debian, `sudo apt install chromium`")
    return found


@pytest.fixture
def lab_address(tmp_path: Path) -> Iterator[str]:
    """The address, with its token, of a JupyterLab on an empty work folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "lab.log"
    environment = os.environ | {
        "COURSE_VENV": "off",
        "COURSE_WORK": str(tmp_path / "work"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "PYTHONPATH": str(REPO_ROOT),
    }
    command = [sys.executable, "-m", "course_lib", "lab", "--no-browser", "--port", str(port)]
    with log.open("w") as output:
        lab = subprocess.Popen(
            command, cwd=REPO_ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield _address(lab, log)
    finally:
        # Once asks whether it is meant, twice is an answer; what is left of the group then is a fault of ours.
        for number in (signal.SIGTERM, signal.SIGTERM):
            lab.send_signal(number)
        try:
            lab.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(lab.pid, signal.SIGKILL)
            raise


def _address(lab: subprocess.Popen, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\S*token=\w+", log.read_text()):
            return found[0]
        if lab.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()}")
