"""The pictures of a run: speed-up bars, the roofline with each case on it, cost against size with its exponent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

from benchmarks import report
from fastgpt.files import atomic_write

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = {"float32": "#2a78d6", "bfloat16": "#e0792b", "float16": "#4ba37c", None: "#7d7d7d"}
_STYLES = ("-", "--", ":", "-.")


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws what the rows allow: speedup.png, roofline.png, scaling.png; returns the paths of those drawn."""
    rows = found["rows"]
    pictures = {
        "speedup.png": (_speedup, [row for row in rows if row["peers"]]),
        "roofline.png": (_roofline, [row for row in rows if row["bytes"] and row["flops"]]),
        "scaling.png": (_scaling, report.exponents(rows)),
    }
    paths = []
    for name, (picture, data) in pictures.items():
        if data:
            figure = picture(data, found["ceilings"])
            with atomic_write(folder / name, binary=True) as file:
                figure.savefig(file, format="png", dpi=130)
            plt.close(figure)
            paths.append(folder / name)
    return paths


def _speedup(rows: Sequence[report.Row], ceilings: Mapping[str, Any]) -> Any:
    """A bar for each benchmark and dtype: the geometric mean over its cases of the ratio to the best peer; a dot for
    each case."""
    groups: dict[str, dict[str | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        threads = f" ({row['threads']} threads)" if row["threads"] > 1 else ""
        name = row["name"] if row["name"].startswith(row["suite"]) else f"{row['suite']}: {row['name']}"
        ratio = row["peers"][report.best_peer(row)]["ratio"]
        groups[f"{name}{threads}"][row["dtype"]].append(ratio)
    bars = [(name, dtype, ratios) for name, dtypes in groups.items() for dtype, ratios in dtypes.items()][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(bars) + 1.2), layout="constrained")
    for y, (_, dtype, ratios) in enumerate(bars):
        color = COLORS.get(dtype, COLORS[None])
        axes.barh(y, geometric_mean(ratios) - 1, left=1, height=0.7, color=color, alpha=0.6)
        axes.plot(ratios, [y] * len(ratios), ".", color=color, markersize=4)
    axes.set_yticks(range(len(bars)), [f"{name} {dtype or ''}" for name, dtype, _ in bars], fontsize=7)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.axvline(1, color="black", linewidth=0.8)
    _log(axes, "x", [r for _, _, ratios in bars for r in ratios])
    axes.set_xlabel("times as fast as the best peer; bar: geometric mean over the cases, which are the dots")
    _plain_frame(axes)
    return figure


def _log(axes: Any, axis: str, values: Sequence[float]) -> None:
    """A logarithmic axis of ratios with plain numbers on it."""
    getattr(axes, f"set_{axis}scale")("log")
    ticks = [
        t
        for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
        if min(values) / 2 <= t <= max(values) * 2
    ]
    getattr(axes, f"set_{axis}ticks")(ticks, [f"{t:g}" for t in ticks])
    getattr(axes, f"{axis}axis").set_minor_locator(matplotlib.ticker.NullLocator())


def _roofline(rows: Sequence[report.Row], ceilings: Mapping[str, Any]) -> Any:
    """GFLOP/s over FLOP a byte, a panel for each number of threads, under the roof of the measured ceilings."""
    counts = sorted({row["threads"] for row in rows})
    figure, panels = plt.subplots(
        1, len(counts), figsize=(7.5 * len(counts), 5.5), layout="constrained", squeeze=False, sharey=True
    )
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    markers = dict(zip(suites, "osD^v<>Pp*hX8dH" * (len(suites) // 15 + 1), strict=False))
    for axes, threads in zip(panels[0], counts, strict=True):
        some = [row for row in rows if row["threads"] == threads]
        intensities = [row["flops"] / row["bytes"] for row in some]
        low, high = min(intensities) / 2, max(intensities) * 2
        top = ceilings.get(str(threads), {})
        for dtype in ("float32", "bfloat16"):
            if dtype in top:
                bandwidth = max(top["copy"], top["read"])
                knee = top[dtype] / bandwidth
                xs = [low, *([knee] if low < knee < high else []), max(high, knee)]
                ys = [min(x * bandwidth, top[dtype]) / 1e9 for x in xs]
                axes.plot(xs, ys, color=COLORS[dtype], linewidth=1, label=f"ceiling, {dtype}")
        for row in some:
            color = COLORS.get(row["dtype"], COLORS[None])
            rate = row["flops"] / row["seconds"] / 1e9
            axes.plot(row["flops"] / row["bytes"], rate, markers[row["suite"]], color=color, markersize=5, alpha=0.7)
        for suite in suites:
            axes.plot([], [], markers[suite], color="#555555", markersize=5, label=suite)
        axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", title=f"{threads} thread{'s' * (threads > 1)}")
        _plain_frame(axes)
    panels[0][0].set_ylabel("GFLOP/s")
    panels[0][-1].legend(fontsize=7, loc="lower right", ncols=2)
    return figure


def _scaling(fits: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]) -> Any:
    """Seconds over size, a panel for each series."""
    columns = min(3, len(fits))
    lines = -(-len(fits) // columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(fits) :]:
        axes.set_visible(False)
    for axes, fit in zip(panels.flat, fits, strict=False):
        for (name, seconds), style in zip(fit["curves"].items(), _STYLES * 9, strict=False):
            text = f"{name}: {fit['variable']}^{fit['exponents'][name]:.2f}"
            axes.plot(fit["sizes"], [s * 1e3 for s in seconds], style, marker="o", markersize=3, label=text)
        axes.set(xscale="log", yscale="log", xlabel=fit["variable"], ylabel="ms")
        axes.set_xticks(fit["sizes"], [str(size) for size in fit["sizes"]], fontsize=7)
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.set_title(fit["series"], fontsize=9)
        axes.legend(fontsize=7)
        _plain_frame(axes)
    return figure


def _plain_frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
