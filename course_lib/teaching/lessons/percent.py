"""The percent format as lessons use it: a header, cells, solution regions.

Owns the text of a lesson's source file, not its meaning. Stricter and much quicker than jupytext, which takes
1.5 s to import, while `check` in the learner's kernel reads lessons too; a gate compares the two on every
lesson. Invariant: a cell that is accepted here is the same cell to jupytext.

    #: solution           what the solved edition shows
    return 2 * layers
    #: stub               what the learner's edition shows instead; without it `...  # your code here`
    ...
    #: end
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_CELL = re.compile(r'# %%(?P<markdown> \[markdown\])?(?: tags=\[(?P<tags>"[^\]]*")\])?\s*')
_REGION = re.compile(r"(?P<indent>\s*)#: (?P<marker>solution|stub|end)\s*")
_REGION_ORDER = {("", "solution"), ("solution", "stub"), ("solution", "end"), ("stub", "end")}


class FormatError(Exception):
    """What is wrong, and in which line (from 1)."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


@dataclass(frozen=True)
class PercentCell:
    """A cell as it stands in the file."""

    line: int  # of its marker, from 1
    markdown: bool
    tags: tuple[str, ...]
    text: str  # without `# ` when it is markdown


def split_cells(text: str) -> tuple[str, list[PercentCell]]:
    """(what stands before the first cell, the cells). Raises FormatError."""
    lines = text.splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("# %%")]
    borders = [*starts, len(lines)]
    cells = [_cell(lines[start:end], start + 1) for start, end in pairwise(borders)]
    return "\n".join(lines[: borders[0]]), cells


def _cell(lines: Sequence[str], number: int) -> PercentCell:
    marker = _CELL.fullmatch(lines[0])
    if marker is None:
        raise FormatError(number, 'a cell begins with `# %%`, `# %% [markdown]` or `# %% tags=["exercise"]`')
    body = list(lines[1:])
    if marker["markdown"]:
        for offset, line in enumerate(body, 1):
            if line and line != "#" and not line.startswith("# "):
                raise FormatError(number + offset, "every line of a markdown cell begins with `# `")
        body = [line[2:] for line in body]
    tags = tuple(re.findall(r'"([^"]*)"', marker["tags"] or ""))
    return PercentCell(number, marker["markdown"] is not None, tags, "\n".join(body).strip("\n"))


@dataclass(frozen=True)
class Editions:
    """A code cell as the learner gets it, as it is solved, and the lines of its solution regions."""

    learner: str
    solved: str
    solution_lines: tuple[str, ...]


def split_editions(cell: PercentCell) -> Editions:
    """Apply the solution regions of a code cell. Raises FormatError, also where an edition is not Python."""
    learner: list[str] = []
    solved: list[str] = []
    solution: list[str] = []
    region, indent = "", ""
    for number, line in enumerate(cell.text.split("\n"), cell.line + 1):
        marker = _REGION.fullmatch(line)
        if marker is not None:
            if (region, marker["marker"]) not in _REGION_ORDER:
                raise FormatError(number, "the order of a region is #: solution, #: stub (or none), #: end")
            if region == "solution" and marker["marker"] == "end":
                learner.append(f"{indent}...  # your code here")
            region = marker["marker"].replace("end", "")
            indent = marker["indent"]
        elif line.lstrip().startswith("#:"):
            raise FormatError(number, "`#:` begins a region: #: solution, #: stub, #: end")
        else:
            if region != "solution":
                learner.append(line)
            if region != "stub":
                solved.append(line)
            if region == "solution":
                solution.append(line)
    if region:
        raise FormatError(cell.line, f"the `#: {region}` of this cell has no `#: end`")
    editions = Editions("\n".join(learner).strip("\n"), "\n".join(solved).strip("\n"), tuple(solution))
    for name, source in (("learner", editions.learner), ("solved", editions.solved)):
        try:
            parse_code(source)
        except SyntaxError as error:
            problem = f"in the {name} edition of this cell, line {error.lineno} is not Python: {error.msg}"
            raise FormatError(cell.line, problem) from None
    return editions


def parse_code(source: str) -> ast.Module:
    """The syntax tree of a code cell, where `await` may stand outside functions. Raises SyntaxError."""
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    return compile(source, "<cell>", "exec", flags, dont_inherit=True)
