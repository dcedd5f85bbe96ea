"""Ledgers survive the way to disk and back, bad ones are refused, and tables and pictures are made of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from course_lib.bench.cli import add_bench_arguments, run_bench
from course_lib.bench.ledger import Ledger, LedgerError, Row, read_ledger, spread, write_ledger
from course_lib.bench.table import markdown_table
from course_lib.errors import CourseError

LEDGERS = Path(__file__).resolve().parents[2] / "course_lib" / "bench" / "ledgers"
MACHINE = {"commit": "0123456789abcdef", "cpu": "a processor", "threads": 2, "gpu": None, "versions": {"torch": "2"}}


HEAD = '{"format": 1, "kind": "x", "arguments": {}, "machine": {}, '


def _ledger(factor: float = 1.0) -> Ledger:
    rows = [
        Row("eager", "output tok/s", [10.0 * factor, 12.0 * factor, 11.0 * factor], "single", limit=100.0),
        Row("graphs", "output tok/s", [50.0 * factor], "single", details={"achieved_gb_s": 7.5, "steps": 3}),
        *(Row(str(count), "ms", [count / 100 * factor], "step") for count in (64, 256, 1024)),
    ]
    return Ledger("ladder", {"repeats": 3, "json": Path("x")}, MACHINE, rows)


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return run_bench(parser.parse_args(arguments))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_ledger(path, _ledger())
    again = read_ledger(path)
    assert again.rows == _ledger().rows and again.machine == MACHINE and again.arguments["json"] == "x"
    row = json.loads(path.read_text())["rows"][0]
    assert (row["repeats"], row["median"], row["range"]) == (3, 11.0, [10.0, 12.0])
    write_ledger(path, _ledger(2))
    assert read_ledger(path).rows[0].median == 22 and list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_ledger(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_ledger(path, _ledger())
    before = path.read_text()
    with pytest.raises(TypeError):
        write_ledger(path, Ledger("x", {"bad": object()}, {}, []))
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "is not JSON"),
        ("[1]", "is not a ledger"),
        ('{"format": 99}', "is not a ledger of format 1"),
        ('{"format": 1, "kind": "x", "arguments": {}, "machine": {}}', "'rows' is missing"),
        ('{"format": 1, "kind": 3, "arguments": {}, "machine": {}, "rows": []}', "kind is not of type str"),
        (HEAD + '"rows": [{"name": "a", "unit": "s", "values": ["1"]}]}', "values of row 'a'"),
        (HEAD + '"rows": [{"name": "a", "unit": "s", "values": []}]}', "values of row 'a'"),
    ],
)  # fmt: skip
def test_a_bad_ledger_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(LedgerError, match="bad.json") as caught:
        read_ledger(path)
    assert said in str(caught.value)


def test_a_missing_ledger_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="none.json: cannot be read"):
        _run("table", str(tmp_path / "none.json"))


def test_table_compares_ledgers_row_by_row() -> None:
    table = markdown_table([("here", _ledger()), ("there", _ledger(2))])
    lines = table.splitlines()
    assert lines[0] == "| measured | unit | here | of limit | there | of limit |"
    assert "| single: eager | output tok/s | 11 (10 to 12) | 11% | 22 (20 to 24) | 22% |" in lines
    assert "| single: graphs | output tok/s | 50 |  | 100 |  |" in lines
    assert any("commit 0123456789ab" in line for line in lines)
    assert spread([46063.2, 41849.0, 46888.0]) == "46,063 (41,849 to 46,888)"


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot_and_table_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, magic: bytes
) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, factor in zip(paths, (1, 2), strict=True):
        write_ledger(path, _ledger(factor))
    picture = tmp_path / "out" / f"p.{suffix}"
    assert _run("plot", *map(str, paths), "--output", str(picture)) == 0
    assert picture.read_bytes().startswith(magic) and picture.stat().st_size < 200_000
    assert _run("table", *map(str, paths)) == 0
    assert "| a | of limit | b | of limit |" in capsys.readouterr().out
    with pytest.raises(CourseError, match=".png or .svg"):
        _run("plot", str(paths[0]), "--output", str(tmp_path / "p.gif"))


@pytest.mark.parametrize("path", sorted(LEDGERS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_ledgers_are_whole(path: Path) -> None:
    ledger = read_ledger(path)
    assert path.stat().st_size <= 60_000
    assert ledger.rows and ledger.machine["commit"] and ledger.machine["versions"]["torch"]
