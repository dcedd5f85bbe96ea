"""The house's floors: a room imports only from rooms on floors below its own (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.bootstrap.places import REPO_ROOT

FLOORS = [  # finer than the table of CONTRIBUTING.md where a room uses its neighbours
    ("kernels", "errors"),
    ("bootstrap",),
    ("sampling_params", "outputs", "model_store", "parallel"),
    ("config",),
    ("engine_args",),
    ("core",),
    ("attention", "layers", "sampling"),
    ("models",),
    ("runner",),
    ("executor",),
    ("engine",),
    ("entrypoints",),
    ("teaching", "bench"),
    ("cli", "__init__"),
    ("__main__",),
]
WING_FLOORS = [
    ("catalogue", "notebook_files"),
    ("checking", "lessons", "recording"),
    ("learner",),
    ("building", "explorers"),
    ("commands", "__init__"),
]


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, anywhere in it, except for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    skipped = {id(inner) for node in unseen for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _violations(root: Path, package: str, floors: list[tuple[str, ...]]) -> list[str]:
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    found = []
    for path in sorted(root.rglob("*.py")):
        room = path.relative_to(root).with_suffix("").parts[0]
        for name in _imports(path):
            target = "kernels" if name.startswith("kernels.") else None
            if name.startswith(package + "."):
                target = name.removeprefix(package + ".").split(".")[0]
            if target in floor_of and target != room:
                assert room in floor_of, f"{room} has no floor: add it to CONTRIBUTING.md and to this test"
                if floor_of[target] >= floor_of[room]:
                    found.append(f"{path.relative_to(REPO_ROOT)} imports {name}")
    return found


@pytest.mark.parametrize(
    ("package", "floors"), [("course_lib", FLOORS), ("course_lib.teaching", WING_FLOORS)], ids=["house", "wing"]
)
def test_a_room_imports_only_from_floors_below(package: str, floors: list[tuple[str, ...]]) -> None:
    assert _violations(REPO_ROOT / package.replace(".", "/"), package, floors) == []


def test_kernels_know_nothing_of_the_engine() -> None:
    found = [(path.name, name) for path in (REPO_ROOT / "kernels").rglob("*.py") for name in _imports(path)]
    assert [(path, name) for path, name in found if name.startswith("course_lib")] == []


def test_a_forbidden_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "REPO_ROOT", tmp_path)
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "x.py").write_text("def f():\n    from course_lib.engine import llm_engine\n")
    assert _violations(tmp_path, "course_lib", FLOORS) == ["core/x.py imports course_lib.engine.llm_engine"]
