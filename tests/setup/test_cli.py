"""The command line on a bare Python: help, near commands, exit statuses."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from course_lib import __main__ as entry
from course_lib import cli
from course_lib.bootstrap.places import REPO_ROOT
from course_lib.errors import DiskSpaceError

# without site-packages: what a learner has before the set-up
BARE = [sys.executable, "-S", "-m", "course_lib"]


@pytest.fixture
def command(monkeypatch):
    """Register a command of our own, run without set-up."""

    def register(run, **settings):
        module = type("module", (), {"add_probe_arguments": lambda parser: None, "run_probe": run})
        monkeypatch.setitem(
            cli.COMMANDS, "probe", cli.Command("a probe", "probe_module", "probe", needs=(), **settings)
        )
        monkeypatch.setitem(sys.modules, "probe_module", module)

    return register


@pytest.mark.parametrize("arguments", [["--help"], *([name, "-h"] for name in cli.COMMANDS), []])
def test_help_needs_nothing_installed(arguments, tmp_path):
    environment = {"PATH": "/nonexistent", "HOME": str(tmp_path), "COURSE_VENV": str(tmp_path / "venv")}
    answer = subprocess.run(
        [*BARE, *arguments], cwd=REPO_ROOT, env=environment, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("usage: python3 -m course_lib")
    assert list(tmp_path.iterdir()) == []


def test_starting_by_path_from_another_folder(tmp_path):
    command = [sys.executable, "-S", str(REPO_ROOT / "course_lib"), "--help"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_unknown_command_names_the_near_one(capsys):
    assert cli.main(["genrate", "x"]) == 2
    assert "did you mean `generate`?" in capsys.readouterr().err


def test_unknown_command_without_a_near_one_lists_all(capsys):
    assert cli.main(["zzzzz"]) == 2
    assert "lab, check, progress, test, doctor, generate, chat" in capsys.readouterr().err


def test_unknown_option_is_refused():
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--hurry"])
    assert stop.value.code == 2


def test_course_error_is_one_sentence(command, capsys):
    def fail(args):
        raise DiskSpaceError("no room: make some.")

    command(fail)
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "course_lib: no room: make some.\n"


def test_ctrl_c_is_one_line_and_130(command, capsys):
    command(lambda args: signal.raise_signal(signal.SIGINT))
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


def test_other_arguments_are_passed_on(command):
    seen = []
    command(lambda args, extra: seen.extend(extra) or 0, passes_on=True)
    assert cli.main(["probe", "-k", "scheduler", "-x"]) == 0
    assert seen == ["-k", "scheduler", "-x"]


def test_closed_pipe_ends_quietly():
    program = "import sys; from course_lib import cli; sys.exit(cli.main(['--help']))"
    answer = subprocess.run(
        f'{sys.executable} -u -c "{program}" | true',
        shell=True,
        cwd=REPO_ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in answer.stderr


def test_old_python_is_told_what_to_do(monkeypatch, capsys):
    version = namedtuple("version", "major minor micro releaselevel serial")
    monkeypatch.setattr(sys, "version_info", version(3, 9, 6, "final", 0))
    monkeypatch.setattr(entry.shutil, "which", lambda name: "/usr/bin/x" if name == "python3.12" else None)
    assert entry.main() == 1
    said = capsys.readouterr().err
    assert "Python 3.9" in said and "run `python3.12 -m course_lib`" in said


@pytest.mark.parametrize("name", ["__main__.py", "errors.py"])
def test_what_an_old_python_reads_is_old_syntax(name):
    ast.parse(Path(REPO_ROOT, "course_lib", name).read_text(), feature_version=(3, 6))
