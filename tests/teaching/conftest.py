"""A session in a repository of its own, and the engine's tiny models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.teaching import catalogue
from course_lib.teaching.learner import session
from tests.engine.conftest import tiny_engine, tiny_model_path  # noqa: F401
from tests.teaching.tiny_lesson import Notebook, make_lesson


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Notebook]:
    """A new session in a repository whose only written lesson is the tiny one."""
    monkeypatch.setattr(catalogue, "REPO_ROOT", tmp_path)
    monkeypatch.setenv("COURSE_WORK", str(tmp_path / "work"))
    make_lesson(tmp_path)
    session.current_session.cache_clear()
    main = type(sys)("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    yield Notebook(vars(main))
    session.current_session.cache_clear()
