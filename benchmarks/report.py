"""Turns a benchmark session into a table (terminal, Markdown), JSON and a bar chart."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.ops.native import _C


def rows(benchmarks: Iterable[Any]) -> list[dict[str, Any]]:
    """One row per benchmark that went through ``harness.versus``."""
    out = []
    for b in benchmarks:
        if "peers" in b.extra_info:
            case = b.params or {}
            name = b.name.split("[")[0].removeprefix("test_")
            label = " ".join(str(value).removeprefix("torch.") for value in case.values())
            out.append(
                {"name": name, "case": label, "seconds": b.stats.median, "rounds": b.stats.rounds, **b.extra_info}
            )
    return out


def _cells(row: dict[str, Any]) -> list[str]:
    rate = ", ".join(f"{row[unit]:.0f} {unit}" for unit in ("GB/s", "GFLOP/s") if unit in row)
    peers = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["ratios"].items())
    return [row["name"], row["case"], str(row["threads"]), _time(row["seconds"]), rate, peers]


_HEADER = ["benchmark", "case", "threads", "ours", "rate", "ours is"]


def terminal_table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned columns."""
    cells = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [_HEADER, ["---"] * len(_HEADER), *(_cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], text=True, capture_output=True).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {
        "fastgpt": fastgpt.__version__ + (f" ({commit})" if commit else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "instruction set": _C.cpu.isa(),
    }


def write(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes bench.json, bench.md and speedup.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    paths = [folder / "bench.json", folder / "bench.md", folder / "speedup.png"]
    paths[0].write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    head = "Ratios of medians from interleaved runs; above 1 means ours is faster. Regenerate with `make bench`.\n\n"
    paths[1].write_text(
        "# Benchmarks\n\n" + head + "; ".join(f"{k} {v}" for k, v in about.items()) + "\n\n" + markdown_table(rows)
    )
    _plot(rows, paths[2])
    return paths


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{row['name']} {row['case']} / {peer}", ratio)
        for row in reversed(rows)
        for peer, ratio in reversed(row["ratios"].items())
    ]
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(bars) + 1.2), layout="constrained")
    axes.barh(
        [label for label, _ in bars], [r for _, r in bars], color=["#2a78d6" if r >= 1 else "#b8b8b8" for _, r in bars]
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the peer (log scale)")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
