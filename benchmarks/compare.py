"""What changed between two results files, beyond the noise of both.

What is compared is ours against a peer that stood beside it in both runs: the ratio travels between days and, with
care, machines, which times do not. Of the peers in both files the one with the least noise is taken. A change counts
when it is greater than 95 % of what the rounds of both runs make likely, and MARGIN on top, for what differs between
two processes without any change (addresses, pages). Memory counts above MEMORY_MARGIN and one megabyte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Row

MARGIN, MEMORY_MARGIN = 0.05, 0.1
_HARDWARE = ("cpu", "cores", "instruction set")


@dataclass(frozen=True)
class Change:
    """``factor``: how many times as fast as before ours is, by ``against`` (a peer, or "time"); ``noise``: the factor
    that could be chance, as a fraction."""

    old: Row
    new: Row
    factor: float
    noise: float
    against: str

    @property
    def counts(self) -> bool:
        return abs(math.log(self.factor)) > math.log1p(self.noise)


def change(old: Row, new: Row, *, same_machine: bool) -> Change | None:
    """How a row changed; None where nothing is comparable: no peer in both, and times of different machines."""
    candidates = [
        (_noise(*(row["peers"][peer]["interval"] for row in (old, new))), peer)
        for peer in new["peers"]
        if peer in old["peers"]
    ]
    if candidates:
        noise, peer = min(candidates)
        return Change(old, new, new["peers"][peer]["ratio"] / old["peers"][peer]["ratio"], noise, peer)
    if not same_machine:
        return None
    # The standard error of a median is 1.25 times that of a mean.
    errors = [1.25 * row["spread"] / math.sqrt(row["rounds"]) for row in (old, new)]
    return Change(old, new, old["seconds"] / new["seconds"], _widened(1.96 * math.hypot(*errors)), "time")


def _noise(*intervals: tuple[float, float]) -> float:
    return _widened(math.hypot(*(math.log(high / low) / 2 for low, high in intervals)))


def _widened(log_noise: float) -> float:
    return math.exp(log_noise) * (1 + MARGIN) - 1


def warnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why the comparison must be read with care."""
    different = [n for n in {**old["machine"], **new["machine"]} if old["machine"].get(n) != new["machine"].get(n)]

    def both(names: list[str]) -> str:
        return ", ".join(f"{n} {old['machine'].get(n)!r} and {new['machine'].get(n)!r}" for n in names)

    found = []
    if hardware := [n for n in different if n in _HARDWARE]:
        found.append(f"measured on different machines ({both(hardware)}): ratios to peers are compared, times are not")
    if versions := [n for n in different if n not in (*_HARDWARE, "fastgpt", "commit")]:
        found.append(f"the peers or the system differ ({both(versions)}): a change may be theirs")
    found += [f"{name} is not complete" for name, run in (("A", old), ("B", new)) if not run["complete"]]
    return found


def comparison(a: Path, b: Path) -> str:
    """What a person reads: rows that changed from file A to file B, and rows that only one of them has."""
    old, new = report.read(a), report.read(b)
    befores, afters = ({report.key(row): row for row in run["rows"]} for run in (old, new))
    same = all(old["machine"].get(name) == new["machine"].get(name) for name in _HARDWARE)
    both = [key for key in afters if key in befores]
    changes = {key: change(befores[key], afters[key], same_machine=same) for key in both}
    real = [found for found in changes.values() if found is not None and found.counts]
    lines = [f"A: {a} ({old['machine']['commit']})", f"B: {b} ({new['machine']['commit']})"]
    lines += [f"warning: {text}" for text in warnings(old, new)]
    for title, some in (
        ("slower", sorted((c for c in real if c.factor < 1), key=lambda c: c.factor)),
        ("faster", sorted((c for c in real if c.factor > 1), key=lambda c: -c.factor)),
    ):
        if some:
            lines += ["", f"{title}:", *_aligned([_change_cells(c) for c in some])]
    if grown := [
        _memory_cells(befores[key], afters[key]) for key in both if _memory_changed(befores[key], afters[key])
    ]:
        lines += ["", "memory:", *_aligned(grown)]
    for title, rows, others in (("only in A", befores, afters), ("only in B", afters, befores)):
        if alone := [[_title(row)] for key, row in rows.items() if key not in others]:
            lines += ["", f"{title}:", *_aligned(alone)]
    if unlike := [[_title(afters[key])] for key, found in changes.items() if found is None]:
        lines += ["", "not comparable (no peer in both):", *_aligned(unlike)]
    within = sum(found is not None and not found.counts for found in changes.values())
    lines += ["", f"{within} of {len(both)} rows in both are the same within the noise."]
    return "\n".join(lines)


def _title(row: Row) -> str:
    return " ".join(report.title(row))


def _change_cells(c: Change) -> list[str]:
    times = f"{report.duration(c.old['seconds'])} -> {report.duration(c.new['seconds'])}"
    how = "by its time" if c.against == "time" else f"against {c.against}"
    return [_title(c.new), f"{c.factor:.2f}x as fast {how}", f"noise {c.noise:.0%}", times]


def _memory_changed(old: Row, new: Row) -> bool:
    if old["memory"] is None or new["memory"] is None:
        return False
    grown = abs(new["memory"] - old["memory"])
    return grown > 1e6 and grown > MEMORY_MARGIN * old["memory"]


def _memory_cells(old: Row, new: Row) -> list[str]:
    return [_title(new), f"{report.megabytes(old['memory'])} -> {report.megabytes(new['memory'])}"]


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  " + "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
