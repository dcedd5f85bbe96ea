"""A miniature lesson, and the same one built."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.teaching.building.builder import build
from tests.lessons.miniature import Miniature, write_miniature


@pytest.fixture
def miniature(tmp_path: Path) -> Miniature:
    """A lesson that was never built."""
    return write_miniature(tmp_path / "course")


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Miniature:
    """Built and executed; not to be changed."""
    lesson = write_miniature(tmp_path_factory.mktemp("built"))
    build(lesson)
    return lesson


@pytest.fixture
def built(built_once: Miniature, tmp_path: Path) -> Iterator[Miniature]:
    """A copy of the built lesson, to be broken."""
    root = tmp_path / "course"
    shutil.copytree(built_once.root, root)
    return write_miniature(root)
