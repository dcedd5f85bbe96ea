"""Installing: half-installed packages, full disks, pip's failures in one sentence, the pins."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course_lib.bootstrap import packages, pip_runs, places, torch_index
from course_lib.bootstrap.places import CONSTRAINTS, REQUIREMENTS, running_inside, venv_folder
from course_lib.errors import DiskSpaceError, DownloadError, SetupError


def _package(site_packages, name, *, installer=True, files=("a.py",), missing=()):
    metadata = site_packages / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    (metadata / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in files))
    (site_packages / name).mkdir()
    for file in files:
        if file not in missing:
            (site_packages / name / file).touch()
    if installer:
        (metadata / "INSTALLER").write_text("pip\n")
    return metadata


def test_half_installed_packages_are_forgotten(tmp_path):
    whole = _package(tmp_path, "whole")
    no_installer = _package(tmp_path, "no_installer", installer=False)
    file_missing = _package(tmp_path, "file_missing", files=("a.py", "b.py"), missing=("b.py",))
    (tmp_path / "~hole").mkdir()
    assert packages.forget_half_installed(tmp_path) == ["file_missing-1.0", "no_installer-1.0"]
    assert whole.exists() and not no_installer.exists() and not file_missing.exists()
    assert not (tmp_path / "~hole").exists()


def test_files_never_compiled_do_not_count_as_missing(tmp_path):
    _package(tmp_path, "lazy", files=("a.py", "a.cpython-311.pyc"), missing=("a.cpython-311.pyc",))
    assert packages.forget_half_installed(tmp_path) == []


@pytest.fixture
def installing(tmp_path, monkeypatch):
    """`install_requirements` with pip replaced; returns (call, the arguments pip got)."""
    seen = []
    monkeypatch.setattr(torch_index, "torch_arguments", lambda: ["--extra-index-url", "https://example.org"])
    monkeypatch.setattr(packages, "run_pip", lambda python, arguments, **settings: seen.append(arguments))
    return (lambda: packages.install_requirements(tmp_path, tmp_path, 0)), seen


def test_pip_gets_the_requirements_and_the_chosen_index(installing, tmp_path):
    install, seen = installing
    install()
    [arguments] = seen
    assert arguments[0] == "install" and str(REQUIREMENTS) in arguments
    assert arguments[-2:] == ["--extra-index-url", "https://example.org"]
    assert not (tmp_path / packages.UNFINISHED).exists()


def test_interrupted_pip_is_repaired_next_time(installing, tmp_path, monkeypatch):
    install, _ = installing
    half = _package(tmp_path, "half", installer=False)

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packages, "run_pip", interrupted)
        install()
    assert (tmp_path / packages.UNFINISHED).exists() and half.exists()
    install()
    assert not half.exists()


def test_full_disk_is_refused_before_pip_starts(installing, monkeypatch):
    install, seen = installing
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 5 * 10**8))
    with pytest.raises(DiskSpaceError, match=r"needs \d+\.0 GB of free disk space and there are 0\.5 GB"):
        install()
    assert seen == []


PIP_SAID = {
    "OSError: [Errno 28] No space left on device": (DiskSpaceError, "filled up"),
    "urllib3.exceptions.NewConnectionError: Failed to establish a new connection: [Errno 111]": (
        DownloadError,
        "reached",
    ),
    "Could not fetch URL: There was a problem confirming the ssl certificate: CERTIFICATE_VERIFY_FAILED": (
        DownloadError,
        "PIP_CERT",
    ),
    "ERROR: No matching distribution found for torch==2.13.0": (
        DownloadError,
        "no torch==2.13.0 for this Python",
    ),
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES": (DownloadError, "damaged"),
    "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'": (
        SetupError,
        "written",
    ),
    "Segmentation fault": (SetupError, "status 7"),
}


@pytest.mark.parametrize("said", PIP_SAID)
def test_what_pip_says_becomes_a_sentence(tmp_path, said):
    (tmp_path / "log").write_text(f"Collecting torch\n{said}\n")
    kind, words = PIP_SAID[said]
    error = pip_runs.explain(tmp_path / "log", 7, "installing packages")
    assert type(error) is kind and words in str(error)


def test_no_network(tmp_path, monkeypatch, capsys):
    """The real pip against an address where nothing answers."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with (
        open(tmp_path / "lock", "w") as lock,
        pytest.raises(DownloadError, match="could not be reached while fetching x"),
    ):
        pip_runs.run_pip(
            sys.executable,
            ["download", "--no-deps", "--dest", str(tmp_path), "six"],
            log=tmp_path / "log",
            doing="fetching x",
            lock_descriptor=lock.fileno(),
        )
    assert capsys.readouterr().out == ""


def test_unknown_failure_shows_pips_own_words(tmp_path, capsys):
    with open(tmp_path / "lock", "w") as lock, pytest.raises(SetupError, match="its own words are above"):
        pip_runs.run_pip(
            sys.executable,
            ["install", "-r", str(tmp_path / "nowhere.txt")],
            log=tmp_path / "log",
            doing="fetching x",
            lock_descriptor=lock.fileno(),
        )
    assert "nowhere.txt" in capsys.readouterr().out


def _pins(path):
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_every_pin_is_one_version():
    for requirement in [*_pins(REQUIREMENTS), *_pins(CONSTRAINTS)]:
        assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), requirement
    assert "\n-c constraints.txt\n" in "\n" + REQUIREMENTS.read_text()


def test_requirements_and_constraints_agree():
    constraints = {canonicalize_name(pin.name): pin.specifier for pin in _pins(CONSTRAINTS)}
    for requirement in _pins(REQUIREMENTS):
        assert constraints[canonicalize_name(requirement.name)] == requirement.specifier, requirement


def test_everything_that_gets_installed_is_pinned():
    """Follow what the requirements need, in this environment, to the end."""
    pinned = {canonicalize_name(pin.name) for pin in _pins(CONSTRAINTS)}
    todo, seen = [(requirement, "") for requirement in _pins(REQUIREMENTS)], set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in pinned, f"{requirement} is pinned nowhere: add it to constraints.txt"
        try:
            needed = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue  # another platform's
        todo += [(child, extra) for child in needed for extra in ("", *requirement.extras)]
    assert len(seen) > 80


@pytest.mark.skipif(
    not running_inside(venv_folder() or places.REPO_ROOT), reason="not the course's environment"
)
def test_this_environment_has_the_pinned_versions():
    for pin in _pins(CONSTRAINTS):
        try:
            installed = version(pin.name)
        except PackageNotFoundError:
            continue
        assert installed.split("+")[0] == str(pin.specifier).removeprefix("=="), pin
