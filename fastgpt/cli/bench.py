"""``fastgpt bench``: the benchmark suites of a source checkout, and what changed between two of their results."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastgpt.cli.errors import plain_errors

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"


def suites() -> dict[str, Path]:
    """The files of benchmarks/ that hold benchmarks, by the name that the command line takes."""
    return {
        path.stem: path
        for path in sorted(FOLDER.glob("*.py"))
        if re.search(r"^def test_", path.read_text(encoding="utf-8"), re.M)
    }


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITE]...", help="Operator names, training_step, generate, scaling. Default: all."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases, few rounds, no compiled peers: under two minutes.")
    ] = False,
    long: Annotated[bool, typer.Option("--long", help="Also the cases that take minutes each.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=600, help="About how long the run may take; rounds are shared out. Default: 9, quick 1.5."
        ),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="The folder for bench.json, bench.md and the plots.", file_okay=False)
    ] = Path("results"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the rows of other suites in the folder: a run in several parts.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Run nothing: print what changed from A to B beyond the noise."),
    ] = None,
    publish: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Run nothing: rewrite docs/benchmarks.* and README's table from FILE."),
    ] = None,
) -> None:
    """Time the kernels against their peers, taking turns in one run; print a table, write JSON, a page and plots.

    Ctrl-C ends the run; what was measured by then is printed and written.
    """
    with plain_errors():
        if not FOLDER.is_dir():
            raise ValueError("the benchmark suites live in a source checkout of fastgpt; this is an installed copy")
        if (compare or publish) and (names or quick or long or keep or minutes):
            raise ValueError(f"--{'compare' if compare else 'publish'} runs no benchmarks: give it files alone")
        if compare and publish:
            raise ValueError("--compare and --publish do not go together")
        if quick and long:
            raise ValueError("--quick and --long do not go together")
        sys.path.insert(0, str(ROOT))
        if compare:
            from benchmarks.compare import comparison

            typer.echo(comparison(*compare))
            return
        if publish:
            from benchmarks.publish import publish as rewrite

            for path in rewrite(publish):
                typer.echo(f"wrote {path}")
            return
        known = suites()
        if unknown := [name for name in names or () if name not in known]:
            raise ValueError(f"there is no suite {unknown[0]!r}; there are: {', '.join(known)}")
        try:
            import pytest
            import pytest_benchmark  # noqa: F401
        except ImportError as error:
            raise ValueError(f"the suites need {error.name}, one of the packages of `pip install -e .[dev]`") from error
        options = [f"--{name}" for name, wanted in (("quick", quick), ("long", long), ("keep", keep)) if wanted]
        options += [f"--minutes={minutes or (1.5 if quick else 9)}", f"--results={results.resolve()}"]
        command = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--benchmark-quiet",
            "--disable-warnings",
            "-o",
            "console_output_style=classic",
            *options,
        ]
        _check_writable(results, keep)
        os.chdir(ROOT)
        raise typer.Exit(int(pytest.main([*command, *(str(known[name]) for name in names or known)])))


def _check_writable(folder: Path, keep: bool) -> None:
    """Now rather than after ten minutes of measuring."""
    from benchmarks import report

    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder for the results, {folder}, cannot be written")
    if keep and (folder / "bench.json").exists():
        report.check_same_source(report.read(folder / "bench.json")["machine"], report.machine())
