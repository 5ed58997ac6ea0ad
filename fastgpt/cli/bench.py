"""``fastgpt bench``: the benchmark suites of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]


def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="Suites to run: operator names, training_step, generate. Default: all.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Also write bench.md, bench.json and speedup.png into this folder.")
    ] = None,
) -> None:
    """Time the kernels against their peers, side by side in one run, and print the ratios."""
    folder = ROOT / "benchmarks"
    if not folder.is_dir():
        raise typer.BadParameter("the benchmark suites live in a source checkout of fastgpt; this is an installed copy")
    helpers = {"__init__", "conftest", "gpu", "harness", "report"}
    known = {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem not in helpers}
    if unknown := [name for name in suites or () if name not in known]:
        raise typer.BadParameter(f"unknown suite {unknown[0]!r}; there are: {', '.join(known)}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-columns=median,rounds"]
    command += [str(known[name]) for name in suites or known]
    if results is not None:
        command.append(f"--results={results.resolve()}")
    raise typer.Exit(subprocess.run(command, cwd=ROOT).returncode)
