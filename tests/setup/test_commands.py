"""lab, test and doctor: what they start, what they keep, what they report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from course_lib.bootstrap import doctor, lab, testing
from course_lib.bootstrap.places import REPO_ROOT


def test_pytest_runs_over_tests_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(testing, "usable_cores", lambda: 1)
    assert testing.pytest_command(False, [])[1:] == ["-m", "pytest", "tests"]
    assert testing.pytest_command(True, ["-x"])[1:] == ["-m", "pytest", "tests", "-m", "not slow", "-x"]
    named = testing.pytest_command(False, [f"{REPO_ROOT}/tests/setup/test_cli.py::test_x", "-q"])
    assert "tests" not in named


def test_everything_runs_on_all_cores_and_named_tests_one_by_one(monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setattr(testing, "usable_cores", lambda: 64)
    at_once = ["-n", str(testing.MOST_WORKERS), "--dist", "worksteal"]
    assert testing.pytest_command(False, ["-k", "scheduler"])[3:] == ["tests", *at_once, "-k", "scheduler"]
    for extra in ([str(REPO_ROOT / "tests" / "setup")], ["--pdb"], ["-n", "0"], ["-s"]):
        assert "worksteal" not in testing.pytest_command(False, extra)


def test_lab_command():
    command = lab.lab_command(REPO_ROOT / "work" / "HOME.md", browser=False, port=9000)
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert {
        "--no-browser",
        "--port=9000",
        "--LabApp.default_url=/lab/tree/work/HOME.md",
        f"--ServerApp.root_dir={REPO_ROOT}",
    } <= set(command)
    command = lab.lab_command(Path("/elsewhere/work/HOME.md"))
    assert {"--LabApp.default_url=/lab/tree/HOME.md", "--ServerApp.root_dir=/elsewhere/work"} <= set(command)
    assert not [argument for argument in command if "port" in argument or "browser" in argument]


def test_lab_starts_with_the_courses_settings(monkeypatch):
    started = []
    monkeypatch.setattr(lab.os, "execve", lambda *arguments: started.append(arguments))
    lab.become_jupyterlab(
        REPO_ROOT / "work", {"JUPYTER_CONFIG_PATH": "/mine", "A": "b"}, browser=True, port=None
    )
    [(program, command, environment)] = started
    assert program == command[0] == sys.executable and environment["A"] == "b"
    assert environment["JUPYTER_CONFIG_PATH"].split(":") == [str(lab.SETTINGS), "/mine"]
    settings = json.loads((lab.SETTINGS / "labconfig" / "default_setting_overrides.json").read_text())
    viewers = settings["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]
    assert viewers == {"markdown": "Markdown Preview"}


def _report(check):
    return {finding.topic: finding for finding in check()}


def test_doctor_runs_without_an_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COURSE_VENV", str(tmp_path / "env"))
    assert doctor.run_doctor() == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'env'} is missing" in said and "→ run `python3 -m course_lib test --quick`" in said


def test_doctor_runs_with_a_broken_environment(tmp_path, monkeypatch):
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("COURSE_VENV", str(tmp_path / "env"))
    report = _report(doctor.check_environment)
    assert report["environment"].fix and "does not run" in report["python"].text and report["python"].fix


def _facts(**changes):
    versions = {"torch": "2.13.0+cpu", "triton": "3.7.1", "transformers": "5.23.0"}
    return {"executable": "python", "import_errors": {}, "cuda_devices": [], "versions": versions, **changes}


def test_doctor_accepts_the_cpu_build_of_the_pinned_torch():
    assert not any(finding.fix for finding in doctor._packages(_facts(), managed=True))


@pytest.mark.parametrize(
    "facts",
    [
        _facts(import_errors={"torch": "OSError: libtorch.so"}),
        _facts(versions={"torch": None}),
        _facts(versions={"torch": "1.0.0"}),
    ],
)
def test_doctor_finds_a_bad_torch_and_says_how_to_fix_it(facts):
    [finding] = [finding for finding in doctor._packages(facts, managed=True) if finding.topic == "torch"]
    assert finding.fix


def test_doctor_says_why_there_is_no_triton_on_a_mac(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    [finding] = doctor._packages(_facts(versions={"triton": None}), managed=True)
    assert not finding.fix and "Linux only" in finding.text


def test_doctor_status_is_zero_when_all_is_well(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_environment", lambda: [doctor.Finding("environment", "fine")])
    monkeypatch.setattr(doctor, "check_machine", lambda: [doctor.Finding("memory", "plenty")])
    assert doctor.run_doctor([lambda: [doctor.Finding("model", "there")]]) == 0
    assert "Everything is in order." in capsys.readouterr().out
