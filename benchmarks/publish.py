"""Rewrites docs/benchmarks.json, docs/benchmarks.md, its plots and README's table from one results file.

So that README and docs quote nothing but what `fastgpt bench` wrote; a test holds them to docs/benchmarks.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from fastgpt.files import atomic_write, write_json

BEGIN, END = "<!-- from docs/benchmarks.json -->", "<!-- end -->"
# README's lines: words, suite, benchmark and the case's parameters but for the dtype.
LINES: list[tuple[str, str, str, dict[str, Any]]] = []
DTYPES = ("float32", "bfloat16")


def publish(source: Path, root: Path = report.ROOT) -> list[Path]:
    """Rewrites them under ``root``; returns the paths.

    Raises:
        OSError, ValueError: ``source`` is no results file of a complete run, or README has no place for its table.
    """
    found = report.read(source)
    if not found["complete"]:
        raise ValueError(f"{source} is not complete: the run was stopped, or a benchmark failed")
    docs = root / "docs"
    readme = root / "README.md"
    text = with_table(readme.read_text(encoding="utf-8"), table(found))
    write_json(docs / "benchmarks.json", found)
    drawn = plots.draw(found, docs / "images" / "benchmarks")
    for path, content in ((docs / "benchmarks.md", page(found, docs)), (readme, text)):
        with atomic_write(path) as file:
            file.write(content)
    return [docs / "benchmarks.json", docs / "benchmarks.md", readme, *drawn]


def page(found: Mapping[str, Any], docs: Path) -> str:
    """docs/benchmarks.md."""
    images = sorted((docs / "images" / "benchmarks").glob("*.png"))
    return report.markdown(found, [path.relative_to(docs) for path in images])


def table(found: Mapping[str, Any]) -> str:
    """README's table: ratio to the best peer, and how near the floor ours comes.

    Raises:
        ValueError: a line of LINES has no row in ``found``.
    """
    rows = {(row["suite"], row["name"], row["dtype"], *_case(row["case"], row["dtype"])): row for row in found["rows"]}
    lines = []
    for words, suite, name, case in LINES:
        some = [rows.get((suite, name, dtype, *_case(case, dtype))) for dtype in DTYPES]
        if some == [None] * len(DTYPES):
            raise ValueError(f"the results hold no row for README's line {words!r} ({suite}, {name}, {case})")
        lines.append([words, *(_cell(row) for row in some)])
    machine = found["machine"]
    head = f"{machine['cpu']}, {machine['instruction set']}, torch {machine['torch']}, commit {machine['commit']}:\n\n"
    return head + report.markdown_table(["work", *DTYPES], lines)


def _case(case: Mapping[str, Any], dtype: str | None) -> tuple[str, ...]:
    return tuple(sorted(f"{name}={value}" for name, value in case.items() if value != dtype))


def _cell(row: report.Row | None) -> str:
    if row is None:
        return ""
    floor = f", {row['floor'] / row['seconds']:.0%} of the floor" if row["floor"] else ""
    best = report.best_peer(row)
    return (f"{row['peers'][best]['ratio']:.2f}x {best}" if best else report.duration(row["seconds"])) + floor


def with_table(readme: str, table: str) -> str:
    """README with ``table`` between its two marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the table: the marks {BEGIN} and {END}")
    return f"{before}{begin}\n{table}{end}{after}"
