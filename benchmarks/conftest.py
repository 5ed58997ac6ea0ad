"""A benchmark session: which cases run, how long each may take, a line for each as it ends, and the results.

Ctrl-C, or a benchmark that fails, ends or marks the run; what was measured by then is printed and written all the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import ceilings, harness, report


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt benchmarks")
    group.addoption("--results", metavar="FOLDER", help="write bench.json, bench.md and the plots into FOLDER")
    group.addoption("--keep", action="store_true", help="keep the rows of other suites that FOLDER/bench.json has")
    group.addoption("--quick", action="store_true", help="only the cases marked quick, fewer rounds, no compiled peers")
    group.addoption("--long", action="store_true", help="also the cases marked long")
    group.addoption("--minutes", type=float, default=9.0, help="what the rounds of all cases together should take")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick(**parameters): the cases that `fastgpt bench --quick` runs")
    config.addinivalue_line("markers", "long(**parameters): the cases that only `fastgpt bench --long` runs")
    config.pluginmanager.register(Session(config), "fastgpt-benchmarks")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


def marked(item: pytest.Item, name: str) -> bool:
    """Whether one of the item's marks of that name fits all the parameters that it names."""
    callspec = getattr(item, "callspec", None)
    given = callspec.params if callspec else {}
    for mark in item.iter_markers(name):
        if unknown := set(mark.kwargs) - set(given):
            raise pytest.UsageError(f"{item.nodeid}: its mark {name!r} names no parameter of it: {sorted(unknown)}")
        wanted = {k: v if isinstance(v, list | tuple | set) else [v] for k, v in mark.kwargs.items()}
        if all(given[k] in values for k, values in wanted.items()):
            return True
    return False


class Session:
    """The hooks of one run, and what they have to remember."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left = self.count = 0
        self.idle = ""  # suites without a case in a run of this kind
        self.ceilings: dict[str, dict[str, float]] = {}
        harness.settings.quick, harness.settings.long = config.getoption("quick"), config.getoption("long")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is written

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        wanted = (lambda i: marked(i, "quick")) if config.getoption("quick") else (lambda i: not marked(i, "long"))
        if config.getoption("long"):
            wanted = bool
        chosen = [item for item in items if wanted(item)]
        if len(chosen) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        if idle := sorted({item.path.stem for item in items} - {item.path.stem for item in chosen}):
            self.idle = ", ".join(idle)
        items[:] = chosen

    def pytest_runtestloop(self, session: pytest.Session) -> None:
        self.left = self.count = len(session.items)
        if self.count and not session.config.option.collectonly and not session.config.getoption("benchmark_disable"):
            self._measure_ceilings()
        self.end = time.monotonic() + 60 * session.config.getoption("minutes")

    def _measure_ceilings(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for threads in sorted({1, cores}):
            found = ceilings.measure(threads)
            self.ceilings[str(threads)] = ceilings.best(found, self.ceilings.get(str(threads), found))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        most = 0.5 if harness.settings.quick else 1.5
        share = (self.end - time.monotonic()) / max(self.left, 1)
        harness.settings.seconds = min(most, max(0.1, 0.6 * share))  # the rest goes into making inputs and warming up
        self.left -= 1
        suite, _, case = nodeid.split("/")[-1].partition(".py::test_")
        case = case if case.startswith(suite) else f"{suite}: {case}"
        self._terminal().write(f"\n[{self.count - self.left:3}/{self.count}] {case} ", flush=True)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        return ("passed" if report.when == "call" else "", "", "") if report.passed else None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" or not report.passed or not (rows := self._rows()[-1:]):
            return
        self._terminal().write("  ".join(["", *_outcome(rows[0])]), flush=True)

    def _terminal(self):
        return self.config.pluginmanager.getplugin("terminalreporter")

    def _rows(self) -> list[report.Row]:
        session = getattr(self.config, "_benchmarksession", None)
        return report.rows(session.benchmarks if session else (), self.ceilings)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter, exitstatus, config) -> None:
        if self.idle:
            terminalreporter.write_line(f"No case of a run of this kind in: {self.idle}")
        if not self._rows():
            return
        complete = exitstatus == 0
        if complete:
            self._measure_ceilings()  # again: a ceiling is the best that was seen
        rows = self._rows()
        options = " ".join(f"--{name}" for name in ("quick", "long") if config.getoption(name))
        command = f"fastgpt bench {options}".strip()
        found = report.document(rows, self.ceilings, complete=complete, command=command)
        terminalreporter.section("ours against its peers")
        show(found, terminalreporter._tw._file)
        if not complete:
            terminalreporter.write_line(f"Not complete: {len(rows)} of {self.count} cases were measured.")
        if folder := config.getoption("--results"):
            from benchmarks import publish  # which imports matplotlib

            path = Path(folder) / "bench.json"
            if config.getoption("keep") and path.exists():
                found = report.merged(report.read(path), found)
            for path in publish.write(found, Path(folder)):
                terminalreporter.write_line(f"wrote {path}")


def _outcome(row: report.Row) -> list[str]:
    best = report.best_peer(row)
    parts = [report.duration(row["seconds"])]
    if best:
        parts.append(f"{row['peers'][best]['ratio']:.2f}x {best}")
    if row["floor"]:
        parts.append(f"{row['floor'] / row['seconds']:.0%} of the floor")
    return parts


def show(found, file) -> None:
    """The results as tables for a terminal."""
    width = max(shutil.get_terminal_size((150, 24)).columns, 100)
    console = Console(file=file, width=width, highlight=False)
    console.print("  ".join(f"{name}: {value}" for name, value in found["machine"].items()))
    for line in report.ceiling_lines(found["ceilings"]):
        console.print("  ".join(f"{name} {cell}" for name, cell in zip(report.CEILINGS_HEADER, line, strict=True)))
    for suite, rows in report.by_suite(found["rows"]):
        table = Table(title=suite, title_justify="left", box=None, pad_edge=False)
        for name in report.HEADER:
            left = name in ("case", "dtype", "ours is")
            table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=not left)
        for row in rows:
            table.add_row(*report.cells(row))
        console.print(table)
    for fit in report.exponents(found["rows"]):
        powers = ", ".join(f"{name} {fit['variable']}^{power:.2f}" for name, power in fit["exponents"].items())
        console.print(f"{fit['series']}: {powers}")
