"""Ledgers: what a benchmark measured, on which machine, as JSON that can be compared years later.

Invariant: a file is either a whole, valid ledger or absent: writing replaces it in one step, reading checks every
field. A row is one quantity with its value from every repeat; `limit` is what the same machine could at most do,
measured in the same run and unit.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.errors import CourseError

FORMAT = 1
_REMEDY = "name a file that `bench … --json` wrote"
_DIGITS = 6  # significant digits kept of a measured value


class LedgerError(CourseError):
    """A file that is no ledger."""


@dataclass(frozen=True)
class Row:
    """One quantity. `group` collects rows that belong in one picture; `details` are further facts of any JSON type."""

    name: str
    unit: str
    values: list[float]  # one per repeat, in the order measured
    group: str = ""
    limit: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


@dataclass(frozen=True)
class Ledger:
    """One run of one kind of benchmark."""

    kind: str
    arguments: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row]


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Write or replace `path`; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "kind": ledger.kind,
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in ledger.arguments.items()},
        "machine": ledger.machine,
        "rows": [_row_to_json(row) for row in ledger.rows],
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(_layout(content))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_ledger(path: Path) -> Ledger:
    """Raises LedgerError naming the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read ({error.strerror}): {_REMEDY}") from error
    except ValueError as error:
        raise LedgerError(f"{path} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LedgerError(f"{path} is not a ledger of format {FORMAT}: measure again with `bench … --json {path}`")
    try:
        for name, kind in (("kind", str), ("arguments", dict), ("machine", dict), ("rows", list)):
            if not isinstance(content[name], kind):
                raise TypeError(f"{name} is not of type {kind.__name__}")
        rows = [_row_from_json(row) for row in content["rows"]]
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise LedgerError(f"{path} is a damaged ledger: {what}; restore it, or measure again") from error
    return Ledger(content["kind"], content["arguments"], content["machine"], rows)


def _row_to_json(row: Row) -> dict[str, Any]:
    low, high = row.range
    numbers = {"repeats": len(row.values), "values": list(map(_rounded, row.values)), "median": _rounded(row.median),
               "range": [_rounded(low), _rounded(high)]}  # fmt: skip
    limit = None if row.limit is None else _rounded(row.limit)
    optional = {"group": row.group, "limit": limit, "details": row.details}
    present = {name: value for name, value in optional.items() if value not in ("", None, {})}
    return {"name": row.name, "unit": row.unit, **numbers, **present}


def _row_from_json(row: Any) -> Row:
    values = row["values"]
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if not numbers or not values:
        raise ValueError(f"the values of row {row.get('name')!r} are not numbers")
    if not isinstance(row["name"], str) or not isinstance(row["unit"], str):
        raise TypeError("a row's name and unit must be text")
    return Row(row["name"], row["unit"], values, row.get("group", ""), row.get("limit"), row.get("details", {}))


def _layout(content: dict[str, Any]) -> str:
    """One line per row and per entry: differences between two versions of a file can be read."""
    lines = []
    for name, value in content.items():
        if name == "rows":
            inner = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f' "rows": [\n{inner}\n ]')
        elif isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            lines.append(f" {json.dumps(name)}: {{\n{inner}\n }}" if inner else f" {json.dumps(name)}: {{}}")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def spread(values: Sequence[float]) -> str:
    """Median and range, such as "46,063 (41,849 to 46,888)"; a single value alone."""
    middle, low, high = map(number, (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def number(value: float) -> str:
    """Three significant digits below a hundred, whole numbers from there on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(row: Row) -> str:
    """What a row's median is of its limit, such as "81%"; "" without a limit."""
    if not row.limit:
        return ""
    part = row.median / row.limit
    return f"{part:.0%}" if part >= 0.1 else f"{part:.1%}"
