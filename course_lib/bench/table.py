"""Ledgers as one Markdown table: a row per measured quantity, a column per ledger."""

from __future__ import annotations

from collections.abc import Sequence

from course_lib.bench.ledger import Ledger, Row, share, spread


def markdown_table(ledgers: Sequence[tuple[str, Ledger]]) -> str:
    """`ledgers`: (heading of its column, ledger). Rows are matched by group, name and unit; a cell is the median, with
    the range behind it. One line per ledger says where it was measured."""
    shares = any(row.limit for _, ledger in ledgers for row in ledger.rows)
    keys = list(dict.fromkeys(_key(row) for _, ledger in ledgers for row in ledger.rows))
    groups = len({group for group, _, _ in keys}) > 1
    headings = [label or "median (range)" for label, _ in ledgers]
    columns = [column for heading in headings for column in ([heading, "of limit"] if shares else [heading])]
    lines = [_line(["measured", "unit", *columns]), _line(["---"] * 2 + ["---:"] * len(columns))]
    for key in keys:
        group, name, unit = key
        cells = [f"{group}: {name}" if groups and group else name, unit]
        for _, ledger in ledgers:
            row = next((row for row in ledger.rows if _key(row) == key), None)
            cells.append("" if row is None else spread(row.values))
            if shares:
                cells.append("" if row is None else share(row))
        lines.append(_line(cells))
    lines += ["", *(f"{label}{': ' if label else ''}{_provenance(ledger)}  " for label, ledger in ledgers)]
    return "\n".join(lines) + "\n"


def _key(row: Row) -> tuple[str, str, str]:
    return row.group, row.name, row.unit


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _provenance(ledger: Ledger) -> str:
    machine = ledger.machine
    versions = machine.get("versions") or {}
    counts = sorted({len(row.values) for row in ledger.rows})
    where = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} threads"
    repeats = "–".join(map(str, counts[:1] + counts[1:][-1:]))
    commit = str(machine.get("commit"))[:12]
    return f"{ledger.kind} on {where}; n = {repeats}; torch {versions.get('torch')}; commit {commit}"
