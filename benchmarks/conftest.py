"""Prints the table of ratios after a benchmark run, and writes it where ``--results FOLDER`` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FOLDER", help="write bench.md, bench.json and speedup.png into FOLDER")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = report.rows(session.benchmarks) if session else []
    if not rows:
        return
    terminalreporter.section("ours against its peers (ratio of medians, above 1 means ours is faster)")
    terminalreporter.write_line(report.terminal_table(rows))
    if folder := config.getoption("--results"):
        for path in report.write(rows, Path(folder)):
            terminalreporter.write_line(f"wrote {path}")
