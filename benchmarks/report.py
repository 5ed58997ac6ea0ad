"""Results: rows of a benchmark session, the JSON file that holds them, and what people read: a table, a page.

A results file is {"format": "fastgpt-bench", "schema": 1, "command", "complete", "date", "machine", "ceilings" (by
number of threads), "rows"}. Seconds are medians; bytes, flops and rates are in units, not in giga; "ratio" is the
peer's seconds over ours (above 1: ours is faster), "interval" holds 95 % of its bootstrap, "spread" is a robust
standard deviation over the median. "floor" is in seconds (ceilings.py), "memory" is the bytes of memory.py.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastgpt
from benchmarks import ceilings as limits
from fastgpt.files import read_json
from fastgpt.ops.native import _C

FORMAT, SCHEMA = "fastgpt-bench", 1
ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
_KEPT = ("suite", "shape", "dtype", "backend", "threads", "bytes", "flops", "memory", "spread", "peers", "missing")


def rows(benchmarks: Iterable[Any], ceilings: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One row per benchmark that went through ``harness.versus``; ``ceilings`` by number of threads."""
    out = []
    for b in benchmarks:
        info = dict(b.extra_info)
        if "peers" not in info:
            continue
        row = {
            "name": b.name.split("[")[0].removeprefix("test_"),
            "case": {name: _plain(value) for name, value in (b.params or {}).items()},
            **{name: info.pop(name) for name in _KEPT},
            "scale": info.pop("scale", None),
            "seconds": b.stats.median,
            "rounds": b.stats.rounds,
        }
        info.pop("spread", None)
        row["floor"] = limits.floor(row, ceilings.get(str(row["threads"]), {}))
        row["other"] = info
        out.append(row)
    return out


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool | None) else str(value).removeprefix("torch.")


def key(row: Row) -> tuple[str, ...]:
    """What tells a row from every other one of a file."""
    return (row["suite"], row["name"], *(f"{name}={value}" for name, value in row["case"].items()))


def label(row: Row) -> str:
    """The case in words: its parameters but for the dtype, which has a column of its own."""
    return " ".join(_word(name, value) for name, value in row["case"].items() if value != row["dtype"])


def title(row: Row) -> list[str]:
    """Suite, benchmark where it has another name, case and dtype: what a line about a row begins with."""
    name = None if row["name"] == row["suite"] else row["name"]
    return [word for word in (row["suite"], name, label(row), row["dtype"]) if word]


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value}" if isinstance(value, int | float) else str(value)


def best_peer(row: Row) -> str | None:
    """The fastest peer's name."""
    return min(row["peers"], key=lambda name: row["peers"][name]["seconds"], default=None)


def document(
    rows: Sequence[Row], ceilings: Mapping[str, Mapping[str, float]], *, complete: bool, command: str
) -> dict[str, Any]:
    """What a results file holds."""
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "command": command,
        "complete": complete,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": machine(),
        "ceilings": ceilings,
        "rows": list(rows),
    }


def check_same_source(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises ValueError where rows of two runs do not belong into one file: two of what machine() tells."""
    if different := [name for name, value in new.items() if old.get(name) != value]:
        was = ", ".join(f"{name} {old.get(name)!r}, now {new[name]!r}" for name in different)
        raise ValueError(f"the results that are there cannot be kept beside new ones: {was}")


def merged(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the rows of those suites of ``old`` that it does not have, in the suites' order; for a run in parts.

    Raises:
        ValueError: they come from different machines, versions or commits.
    """
    check_same_source(old["machine"], new["machine"])
    fresh = {row["suite"] for row in new["rows"]}
    rows = [row for row in old["rows"] if row["suite"] not in fresh] + new["rows"]
    ceilings = {n: limits.best(found, old["ceilings"].get(n, found)) for n, found in new["ceilings"].items()}
    return {
        **new,
        "rows": sorted(rows, key=lambda row: row["suite"]),
        "ceilings": {**old["ceilings"], **ceilings},
        "complete": old["complete"] and new["complete"],
    }


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no results file, or one of another schema.
    """
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a results file of `fastgpt bench`")
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {found.get('schema')}; this version of fastgpt reads schema {SCHEMA}")
    return found


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with what."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    found = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "instruction set": _C.cpu.isa(),
        "fastgpt": fastgpt.__version__,
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("transformers",):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


HEADER = ["case", "dtype", "threads", "ours", "noise", "of floor", "best peer", "memory", "ours is"]


def cells(row: Row) -> list[str]:
    """A row as text, in HEADER's columns, which fit a terminal."""
    best = best_peer(row)
    peers = [f"{peer['ratio']:.2f}x {name}" for name, peer in row["peers"].items()]
    peers += [f"{name}: {why}" for name, why in row["missing"].items()]
    backend = "" if row["backend"] in ("cpu", "fused") else f" ({row['backend']})"
    return [
        _case_words(row) + backend,
        row["dtype"] or "",
        str(row["threads"]),
        duration(row["seconds"]),
        f"{row['spread']:.0%}",
        f"{row['floor'] / row['seconds']:.0%}" if row["floor"] else "",
        f"{row['peers'][best]['ratio']:.2f}x" if best else "",
        _memory(row, best),
        ", ".join(peers),
    ]


PAGE_HEADER = [
    *("case", "shape", "dtype", "backend", "threads", "ours", "noise", "MB", "MFLOP", "of floor", "best peer"),
    *("memory", "peers"),
]


def page_cells(row: Row) -> list[str]:
    """A row as text, in PAGE_HEADER's columns: all that was measured."""
    _, dtype, threads, ours, noise, of_floor, best, used, _ = cells(row)
    peers = [
        f"{name} {duration(peer['seconds'])} ({peer['ratio']:.2f}x, 95 % in {_interval(peer)})"
        for name, peer in row["peers"].items()
    ]
    peers += [f"{name}: {why}" for name, why in row["missing"].items()]
    counts = ["" if row[n] is None else f"{row[n] / 1e6:.3g}" for n in ("bytes", "flops")]
    shape = (row["shape"] or "").replace(" ", "\u00a0")
    front = [_case_words(row), shape, dtype, row["backend"], threads, ours, noise]
    return [*front, *counts, of_floor, best, used, ", ".join(peers)]


def _case_words(row: Row) -> str:
    return " ".join(filter(None, (row["name"] if row["name"] != row["suite"] else "", label(row)))) or row["name"]


def _interval(peer: Mapping[str, Any]) -> str:
    low, high = peer["interval"]
    return f"{low:.2f} to {high:.2f}"


def _memory(row: Row, best: str | None) -> str:
    """Ours, and what the fastest peer takes."""
    theirs = row["peers"][best]["memory"] if best else None
    ours = row["memory"]
    return "" if ours is None else megabytes(ours) + (f" ({megabytes(theirs)})" if theirs is not None else "")


def by_suite(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of every suite, in the order in which they come first."""
    for suite in dict.fromkeys(row["suite"] for row in rows):
        yield suite, [row for row in rows if row["suite"] == suite]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [list(header), ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def ceiling_lines(ceilings: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The machine's ceilings as text: threads, copy, read, and the products of each dtype."""
    return [
        [threads, *(f"{found[n] / 1e9:.1f}" for n in ("copy", "read")), *(f"{found[d] / 1e9:.0f}" for d in _gemms())]
        for threads, found in ceilings.items()
    ]


def _gemms() -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in limits.GEMM_DTYPES]


CEILINGS_HEADER = ["threads", "copy GB/s", "read GB/s", *(f"GEMM {d} GFLOP/s" for d in _gemms())]

_LEGEND = """\
Medians of rounds in which ours and its peers take turns. *peers*: their times, how many times as fast ours is (above 1:
ours is faster) and where 95 % of that ratio's bootstrap lie; *best peer*: the least of these ratios. *noise*: robust
standard deviation of our rounds. *MB*, *MFLOP*: what must move and what must be computed; *of floor*: how near ours
comes to the time that these take at the ceilings below (work whose data stay in the cache can pass 100 %). *memory*: by
how much one call lets the process grow, its results included (in brackets the fastest peer's).
"""


def markdown(found: Mapping[str, Any], plots: Sequence[Path] = ()) -> str:
    """The results page."""
    parts = ["# Benchmarks\n", f"Written by `{found['command']}`, {found['date']}. {_LEGEND}"]
    if not found["complete"]:
        parts.append("**The run was stopped, or a benchmark failed: cases are missing.**\n")
    parts.append(markdown_table(["", ""], [[name, str(value)] for name, value in found["machine"].items()]))
    parts.append("The machine's ceilings, measured in the same run:\n")
    parts.append(markdown_table(CEILINGS_HEADER, ceiling_lines(found["ceilings"])))
    parts += [f"![{path.stem.replace('-', ' ')}]({path})\n" for path in plots]
    if fits := exponents(found["rows"]):
        parts.append("## How the cost grows\n")
        parts.append("Exponents of the power law fitted to seconds against T or V on log axes.\n")
        names = list(dict.fromkeys(name for fit in fits for name in fit["exponents"]))
        lines = [
            [fit["series"], fit["variable"], f"{fit['sizes'][0]} to {fit['sizes'][-1]}"]
            + [f"{fit['exponents'][name]:.2f}" if name in fit["exponents"] else "" for name in names]
            for fit in fits
        ]
        parts.append(markdown_table(["work", "in", "sizes", *names], lines))
    for suite, some in by_suite(found["rows"]):
        parts.append(f"## {suite}\n")
        parts.append(markdown_table(PAGE_HEADER, (page_cells(row) for row in some)))
    return "\n".join(parts)


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size: least squares.

    Raises:
        ValueError: there are fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs at least two different sizes, not {sorted(set(sizes))}")
    x, y = ([math.log(v) for v in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def exponents(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every curve of cost against a variable: series, variable, sizes, and by name (ours, each peer) the seconds at
    every size and the exponents fitted to them. A peer that lacks a size has no curve."""
    series: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["scale"]:
            variable, value = row["scale"]
            rest = [_word(n, v) for n, v in row["case"].items() if v != value]
            series[" ".join([row["name"], *rest]), variable].append(row)
    found = []
    for (name, variable), some in series.items():
        some = sorted(some, key=lambda row: row["scale"][1])
        sizes = [row["scale"][1] for row in some]
        if len(set(sizes)) < 2:
            continue
        curves = {"ours": [row["seconds"] for row in some]}
        for peer in some[0]["peers"]:
            if all(peer in row["peers"] for row in some):
                curves[peer] = [row["peers"][peer]["seconds"] for row in some]
        fits = {curve: fitted_exponent(sizes, seconds) for curve, seconds in curves.items()}
        found.append({"series": name, "variable": variable, "sizes": sizes, "curves": curves, "exponents": fits})
    return found


def duration(seconds: float) -> str:
    """Three digits, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def megabytes(count: float) -> str:
    """Bytes in MB."""
    if count < 1e5:
        return "<0.1 MB" if count else "0 MB"
    return f"{count / 1e6:.0f} MB" if count >= 9.95e6 else f"{count / 1e6:.1f} MB"
