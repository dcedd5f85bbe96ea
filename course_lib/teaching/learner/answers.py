"""A passed answer as a module of its own: `work/answers/01_2.py`.

Owns the way from a function or class in a notebook to source that runs in any process, and back. Invariant: a
stored answer brings along every global that it uses (imports, constants, helpers); what cannot be brought
along, a live object of the notebook, is refused by name. Source comes from the exercise's cell first, then
from the cell that a function was compiled from, then from the notebook's other cells, newest first.
"""

from __future__ import annotations

import ast
import dis
import linecache
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from course_lib.errors import CourseError
from course_lib.teaching.notebook_files import write_text

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = {list: "[{}]", tuple: "({},)", set: "{{{}}}", frozenset: "frozenset([{}])"}
_LONGEST_LITERAL = 10_000  # characters; more is data, not a constant
_READING = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"}
_WRITING = {"STORE_NAME"}  # STORE_GLOBAL is a function's, which needs the global to be there
_NAMED_BY = "__answer__"  # in a stored module: the answer itself


def capture(exercise_id: str, name: str, cell: str, namespace: Mapping[str, Any]) -> str:
    """The source of a module that defines what `name` is in the notebook.

    `cell` is the source of the cell that defines it, `namespace` the notebook's globals.
    Raises CourseError, naming what cannot be brought along.
    """
    collector = _Collector(cell, namespace)
    collector.bring(name)
    header = f"# Your answer to exercise {exercise_id}, as it passed. Passing again replaces this file."
    return "\n\n".join(
        [header, "from __future__ import annotations", *collector.statements, f"{_NAMED_BY} = {name}\n"]
    )


def run_answer(text: str, path: Path) -> Any:
    """The answer that a captured module defines; `path` names the file in tracebacks.

    Raises CourseError if the module does not run.
    """
    module = ModuleType(f"course_answer_{path.stem}")
    module.__file__ = str(path)
    # the file need not exist yet, and Triton asks for the source of its kernels
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    # dataclasses and pickle look a class's module up there
    sys.modules[module.__name__] = module
    try:
        # compiled here because import's bytecode cache mistakes two versions of one second for the same
        exec(_compiled(text, str(path)), module.__dict__)
        return module.__dict__[_NAMED_BY]
    except Exception as error:
        # not at the top: what a terminal asks of this module works without torch
        from course_lib.teaching.checking.describing import describe_error

        raise CourseError(
            f"{path.name} does not run by itself ({describe_error(error)}): check its exercise again."
        ) from error


def answer_path(work: Path, exercise_id: str) -> Path:
    """Where the answer to an exercise ("01.2") is stored."""
    return work / "answers" / f"{exercise_id.replace('.', '_')}.py"


def stored_answers(work: Path) -> dict[str, Path]:
    """The answers stored in the folder `work`, by exercise id."""
    return {path.stem.replace("_", "."): path for path in sorted((work / "answers").glob("[0-9]*.py"))}


def store_answer(work: Path, exercise_id: str, text: str) -> None:
    """Keep a captured module. Raises CourseError if the folder cannot be written."""
    path = answer_path(work, exercise_id)
    try:
        write_text(path, text)
    except OSError as error:
        raise CourseError(
            f"{path} cannot be written ({error.strerror}): make its folder writable."
        ) from error


def load_answer(path: Path) -> Any:
    """The stored answer. Raises CourseError if the file is missing or does not run."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"{path.name} is missing or unreadable: check its exercise again.") from error
    return run_answer(text, path)


def cells_run(namespace: Mapping[str, Any]) -> list[str]:
    """The cells that a notebook with these globals has run, in order; without a `%%magic` above them."""
    return [_below_magic(cell) for cell in namespace.get("_ih", ())]  # where IPython keeps them


def _below_magic(cell: str) -> str:
    if not cell.startswith("get_ipython().run_cell_magic("):
        return cell
    return ast.parse(cell).body[0].value.args[2].value


class _Collector:
    """Statements that define one name, in an order in which they can run."""

    def __init__(self, cell: str, namespace: Mapping[str, Any]) -> None:
        self.cell = cell
        self.cells = [cell, *reversed(cells_run(namespace))]
        self.namespace = namespace
        self.statements: list[str] = []
        self.brought: set[str] = set()

    def bring(self, name: str) -> None:
        """Add what defines the global `name`, unless it is there already or Python's own."""
        if name in self.brought or name.startswith("__"):
            return
        self.brought.add(name)
        own = [text for node, text in _top_level(self.cell) if name in _names(text, "STORE")]
        if own:
            for text in own:
                self._add(text)
        elif name in self.namespace:
            self._add(self._definition(name, self.namespace[name]))

    def _add(self, text: str) -> None:
        for used in sorted(_names(text, "LOAD")):
            self.bring(used)
        if text not in self.statements:  # one statement may define several names
            self.statements.append(text)

    def _definition(self, name: str, value: Any) -> str:
        """A statement for a global that the exercise's own cell does not define."""
        if isinstance(value, ModuleType):
            return f"import {name}" if value.__name__ == name else f"import {value.__name__} as {name}"
        literal = _literal(value)
        if literal is not None and len(literal) <= _LONGEST_LITERAL:
            return f"{name} = {literal}"
        module, qualname = str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", ""))
        if module != "__main__" and getattr(sys.modules.get(module), qualname, None) is value:
            return f"from {module} import {qualname} as {name}"
        wanted: tuple[type[ast.stmt], ...] = (
            ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom
        )  # fmt: skip
        cells = self.cells
        if isinstance(value, FunctionType):
            wanted += (ast.Assign,)  # a lambda with a name
            # the very cell: one that ran later may have raised before it came to its own version
            cells = ["".join(linecache.getlines(value.__code__.co_filename)), *cells]
        for cell in cells:
            for node, text in _top_level(cell):
                if isinstance(node, wanted) and name in _names(text, "STORE"):
                    return text
        raise CourseError(
            f"your code uses `{name}` ({type(value).__name__}), which exists in this notebook only:"
            " make it an argument, or define it in the exercise's cell."
        )


def _top_level(cell: str) -> Iterator[tuple[ast.stmt, str]]:
    """The statements of a cell and their source, without the decorator @exercise."""
    try:
        _compiled(cell)
    except (SyntaxError, ValueError):
        return  # a cell that never ran
    for node in ast.parse(cell).body:
        text = ast.get_source_segment(cell, node) or ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = "\n".join(cell.split("\n")[node.lineno - 1 : node.end_lineno])  # with its last comment
            for decorator in reversed(node.decorator_list):
                if not _is_exercise(decorator):
                    text = f"@{ast.get_source_segment(cell, decorator)}\n{text}"
        yield node, text


def _is_exercise(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(called, "id", getattr(called, "attr", None)) == "exercise"


def _names(text: str, operation: str) -> set[str]:
    """Globals that a statement defines ("STORE") or that it and the functions in it use ("LOAD").

    Read from the bytecode: it knows what is global, and has no annotations, which are never evaluated.
    """
    code = _compiled(f"from __future__ import annotations\n{text}")
    if operation == "STORE":
        return _operands(code, _WRITING) - {"annotations"}
    return {name for part in _codes(code) for name in _operands(part, _READING) - _operands(part, _WRITING)}


def _compiled(text: str, file: str = "<cell>") -> CodeType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the notebook has shown them
        return compile(text, file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)


def _operands(code: CodeType, operations: set[str]) -> set[str]:
    return {step.argval for step in dis.get_instructions(code) if step.opname in operations}


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _literal(value: Any) -> str | None:
    """Source for a constant, alone or in containers; None for anything else."""
    kind = type(value)
    if kind in _SCALARS:
        return repr(value) if kind is not float or math.isfinite(value) else f'float("{value}")'
    if kind is dict:
        pairs = _literal(list(value.items()))
        return pairs and f"dict({pairs})"
    if kind in _CONTAINERS and len(value) <= _LONGEST_LITERAL:
        items = [_literal(item) for item in value]
        if None not in items:
            return _CONTAINERS[kind].format(", ".join(items)) if items else f"{kind.__name__}()"
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value) if kind.__name__ == "dtype" else f"torch.{value!r}"
    return None
