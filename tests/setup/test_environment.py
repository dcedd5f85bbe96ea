"""The environment: when it is current, what may be cleared, where the process goes on."""

from __future__ import annotations

import json
import os
import shutil
import sys
import venv
from pathlib import Path

import pytest

from course_lib.bootstrap import environment, places
from course_lib.errors import SetupError


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A complete environment (without pip, which takes seconds), and COURSE_VENV naming it."""
    folder = tmp_path / "env"
    venv.create(folder)
    stamp = {**environment._stamp(), "python": "%d.%d" % sys.version_info[:2]}
    (folder / environment.STAMP).write_text(json.dumps(stamp))
    monkeypatch.setenv("COURSE_VENV", str(folder))
    monkeypatch.delenv("COURSE_STARTED_IN", raising=False)
    return folder


@pytest.fixture
def started(monkeypatch):
    """Records what would replace this process."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("off", None), ("OFF", None), ("", places.REPO_ROOT / ".venv"), ("/a/b", Path("/a/b"))],
)
def test_course_venv_setting(monkeypatch, setting, expected):
    monkeypatch.setenv("COURSE_VENV", setting)
    assert places.venv_folder() == expected


def test_complete_environment_is_entered(finished, started):
    environment.ensure_environment(["generate", "Hello there"], ["torch"])
    [(program, command, variables)] = started
    assert program == finished / "bin" / "python"
    assert command[1:] == ["-m", "course_lib", "generate", "Hello there"]
    assert variables["COURSE_STARTED_IN"] == str(finished)


def test_inside_nothing_is_started_again(finished, started, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(finished))
    environment.ensure_environment([], [])
    assert started == []


def test_starting_again_and_again_is_noticed(finished, started, monkeypatch):
    monkeypatch.setenv("COURSE_STARTED_IN", str(finished))
    with pytest.raises(SetupError, match="delete"):
        environment.ensure_environment([], [])


@pytest.mark.parametrize("name", ["REQUIREMENTS", "CONSTRAINTS", "CPU_KERNELS"])
def test_changed_requirements_or_kernels_make_it_stale(finished, tmp_path, monkeypatch, name):
    assert environment.is_current(finished)
    changed = tmp_path / "changed"
    if name == "CPU_KERNELS":
        shutil.copytree(places.CPU_KERNELS, changed)
        (changed / "another.h").write_text("#pragma once\n")
    else:
        changed.write_text(getattr(places, name).read_text() + "another==1\n")
    monkeypatch.setattr(environment, name, changed)
    assert not environment.is_current(finished)


@pytest.mark.parametrize("stamp", ["", "{", "[]", "{}", '{"python": "3.99"}'])
def test_damaged_stamp_makes_it_stale(finished, stamp):
    (finished / environment.STAMP).write_text(stamp)
    assert not environment.is_current(finished)


def test_vanished_interpreter_makes_it_stale(finished):
    (finished / "bin" / "python").unlink()
    assert not environment.is_current(finished)


def test_set_up_does_its_steps_and_stamps_last(tmp_path, started, monkeypatch):
    folder, steps = tmp_path / "env", []
    monkeypatch.setenv("COURSE_VENV", str(folder))

    def fake_install(where, site_packages, lock_descriptor):
        assert not environment.is_current(folder)
        os.fstat(lock_descriptor)
        steps.append(where)

    def make_without_pip(command, **settings):
        if command[-1] == "kernels.cpu.build":
            steps.append("kernels")
        else:
            venv.create(command[-1])
        return 0

    monkeypatch.setattr(environment, "install_requirements", fake_install)
    monkeypatch.setattr(environment, "run", make_without_pip)
    environment.ensure_environment(["doctor"], [])
    assert steps == [folder, "kernels"] and environment.is_current(folder) and len(started) == 1
    [paths] = folder.glob("lib/*/site-packages/course_lib.pth")
    assert paths.read_text() == f"{places.REPO_ROOT}\n"


def test_failed_install_leaves_no_stamp(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    folder = tmp_path / "env"
    monkeypatch.setenv("COURSE_VENV", str(folder))
    monkeypatch.setattr(environment, "install_requirements", interrupted)
    monkeypatch.setattr(environment, "run", lambda command, **settings: venv.create(command[-1]) or 0)
    with pytest.raises(KeyboardInterrupt):
        environment.ensure_environment([], [])
    assert not environment.is_current(folder)


def test_half_made_environment_is_cleared(tmp_path, monkeypatch):
    folder = tmp_path / "env"
    (folder / "lib" / "half").mkdir(parents=True)
    (folder / environment.MARK).touch()
    monkeypatch.setattr(environment, "run", lambda command, **settings: venv.create(command[-1]) or 0)
    environment._make(folder)
    assert not (folder / "lib" / "half").exists() and (folder / "bin" / "python").exists()


def test_somebody_elses_folder_is_never_cleared(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SetupError, match="in the way"):
        environment._make(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_python_without_ensurepip_names_the_package(tmp_path, monkeypatch):
    find = environment.importlib.util.find_spec
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name)
    )
    with pytest.raises(SetupError, match=r"sudo apt install python3\.\d+-venv"):
        environment._make(tmp_path / "env")


def test_off_names_what_this_python_lacks(monkeypatch):
    monkeypatch.setenv("COURSE_VENV", "off")
    environment.ensure_environment([], ["json"])
    with pytest.raises(SetupError, match="lacks nonexistent_module: `.* -m pip install nonexistent_module`"):
        environment.ensure_environment([], ["json", "nonexistent_module"])


def test_intel_mac_is_told(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    with pytest.raises(SetupError, match="Intel Macs"):
        environment._refuse_unsupported_machine()


def test_folder_that_cannot_be_made_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_VENV", str(tmp_path / "file" / "env"))
    with pytest.raises(SetupError, match="cannot be written"):
        environment.ensure_environment([], [])
