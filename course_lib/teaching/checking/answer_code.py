"""What can be read from an answer without running it: its functions, whether they are still empty, and which
of Python's builtins its notebook hides from them.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

OF_IPYTHON = {"open", "exit", "quit"}  # every notebook has its own


def functions_of(answer: Any) -> dict[str, FunctionType]:
    """The function itself, or the functions written in a class, by name; nothing for any other object."""
    members = vars(answer) if inspect.isclass(answer) else {"": answer}
    found = {}
    for name, member in members.items():
        # what a property, and what a cached property or a partial, holds
        member = getattr(member, "fget", getattr(member, "func", member))
        member = inspect.unwrap(member)
        if isinstance(member, FunctionType):
            found[name] = member
    return found


def does_nothing(answer: Any) -> bool:
    """Whether the body of a function, or of every method but `__init__` of a class, is only a docstring,
    `...` or `pass`. Code whose source is not known does something.
    """
    functions = functions_of(answer)
    methods = {name: function for name, function in functions.items() if name != "__init__"} or functions
    return (bool(methods) or inspect.isclass(answer)) and all(map(_is_empty, methods.values()))


def hidden_builtins(answer: Any) -> list[str]:
    """Names of builtins that the answer, or a function of the notebook that it calls, uses and that mean
    something else there, sorted.
    """
    python = vars(builtins)
    hidden = set()
    functions = list(functions_of(answer).values())
    for function in functions:
        for name in _globals_used(function.__code__):
            found = function.__globals__.get(name, python.get(name))
            if found is not python.get(name, found) and name not in OF_IPYTHON:
                hidden.add(name)
            functions += [helper for helper in functions_of(found).values()
                          if helper.__globals__ is function.__globals__ and helper not in functions]
    return sorted(hidden)


def _is_empty(function: FunctionType) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    return isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef) and all(
        isinstance(line, ast.Pass) or isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
        for line in tree.body[0].body)


def _globals_used(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_used(inner)
