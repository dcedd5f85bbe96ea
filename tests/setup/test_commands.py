"""lab, test and doctor: what they start, what they keep, what they report."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from course_lib.bootstrap import doctor, lab, testing
from course_lib.bootstrap.places import REPO_ROOT


def test_pytest_runs_over_tests_unless_told_otherwise():
    assert testing.pytest_command(False, [])[1:] == ["-m", "pytest", "tests"]
    assert testing.pytest_command(True, ["-x"])[1:] == ["-m", "pytest", "tests", "-m", "not slow", "-x"]
    named = testing.pytest_command(False, [f"{REPO_ROOT}/tests/setup/test_cli.py::test_x", "-q"])
    assert "tests" not in named


def test_welcome_notebook_is_made_once_and_then_the_learners(tmp_path):
    notebook = lab.welcome_notebook(work=tmp_path / "work")
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert any("llm.chat(" in source for source in code) and cells[0]["cell_type"] == "markdown"
    for source in code:
        compile(source, "cell", "exec")
    notebook.write_text("mine")
    assert lab.welcome_notebook(work=tmp_path / "work").read_text() == "mine"
    assert [path.name for path in notebook.parent.iterdir()] == ["welcome.ipynb"]


def test_lab_command():
    args = argparse.Namespace(no_browser=True, port=9000)
    command = lab.lab_command(args, REPO_ROOT / "work" / "welcome.ipynb")
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert {
        "--no-browser",
        "--port=9000",
        "--LabApp.default_url=/lab/tree/work/welcome.ipynb",
        f"--ServerApp.root_dir={REPO_ROOT}",
    } <= set(command)


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
