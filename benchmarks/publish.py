"""Writes a run into its folder, or over docs/benchmarks.json, docs/benchmarks.md, its plots and README's table.

So that README and docs quote nothing but what `fastgpt bench` wrote; a test holds them to docs/benchmarks.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from fastgpt.files import atomic_write, write_json

BEGIN, END = "<!-- from docs/benchmarks.json -->", "<!-- end -->"
_BOTH = {"work": "forward_backward"}
_TOP_K = {"vocabulary": 50257, "name": "top_k_top_p"}
# README's lines: words, suite and benchmark, and the case's parameters but for the dtype.
LINES: list[tuple[str, str, dict[str, Any]]] = [
    ("attention, causal, 4 x 12 x 256 x 64", "attention", {**_BOTH, "mask": "causal", "shape": "4 x 256"}),
    ("attention, causal, 1 x 12 x 1024 x 64", "attention", {**_BOTH, "mask": "causal", "shape": "1 x 1024"}),
    ("layer_norm, 4096 x 768", "layer_norm", {**_BOTH, "residual": "plain"}),
    ("layer_norm, 4096 x 768, with a residual", "layer_norm", {**_BOTH, "residual": "residual"}),
    ("rms_norm, 4096 x 768", "rms_norm", {**_BOTH, "residual": "plain"}),
    ("gelu (tanh), 4096 x 3072", "gelu", {**_BOTH, "approximate": "tanh", "bias": "plain"}),
    ("swiglu (packed), 4096 x 2048", "swiglu", {**_BOTH, "form": "packed"}),
    ("rotary, 4 x 12 x 1024 x 64", "rotary", {**_BOTH, "pairs": "half"}),
    ("embedding, 8 x 1024 of 50257 x 768", "embedding", _BOTH),
    ("cross_entropy, 1024 x 50257", "cross_entropy", {**_BOTH, "shape": "gpt2"}),
    ("linear_cross_entropy, 1024 x 768 -> 50257", "linear_cross_entropy", _BOTH),
    ("AdamW, 20M parameters, with clipping", "adamw", {"size": "20M", "clip": "clipped"}),
    ("sample a row of 50257, top-k 50 and top-p 0.9", "sample", {**_TOP_K, "rows": 1}),
    ("sample 16 rows, the same", "sample", {**_TOP_K, "rows": 16}),
    ("a training step of GPT-2 124M, 2 x 256 tokens", "training_step", {"shape": "2 x 256"}),
]
DTYPES = ("float32", "bfloat16")


def write(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes bench.json, bench.md and the plots; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", found)
    drawn = plots.draw(found, folder)
    with atomic_write(folder / "bench.md") as file:
        file.write(report.markdown(found, [path.relative_to(folder) for path in drawn]))
    return [folder / "bench.json", folder / "bench.md", *drawn]


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
    rows = {(row["suite"], row["name"], row["dtype"], _case(row["case"], row["dtype"])): row for row in found["rows"]}
    lines = []
    for words, suite, case in LINES:
        some = [rows.get((suite, suite, dtype, _case(case, dtype))) for dtype in DTYPES]
        if not any(some):
            raise ValueError(f"the results hold no row for README's line {words!r}: {suite}, {case}")
        lines.append([words, *(_cell(row) for row in some)])
    machine = found["machine"]
    head = (
        f"One thread of {machine['cpu']} ({machine['instruction set']}), torch {machine['torch']}, commit "
        f"{machine['commit']}, {found['date']}. Forward + backward where there is one; times as fast as the best peer\n"
        "(which is named), and in brackets how near ours comes to the floor:\n"
    )
    return f"{head}\n{report.markdown_table(['work', *DTYPES], lines)}\n{_slower(found['rows'])}\n"


def _slower(rows: Sequence[report.Row]) -> str:
    """How many cases lose to a peer beyond the noise, and the worst three."""
    judged = [row for row in rows if row["peers"]]
    worst = sorted(
        (row["peers"][report.best_peer(row)]["ratio"], " ".join(report.title(row)), report.best_peer(row))
        for row in judged
        if row["peers"][report.best_peer(row)]["interval"][1] < 1
    )
    listed = ", ".join(f"{words} ({ratio:.2f}x {peer})" for ratio, words, peer in worst[:3])
    return f"{len(worst)} of the {len(judged)} cases are slower than their best peer" + (
        f", the slowest {listed}." if worst else "."
    )


def _case(case: Mapping[str, Any], dtype: str | None) -> tuple[str, ...]:
    """Comparable parameters, without the dtype."""
    return tuple(sorted(f"{name}={value}" for name, value in case.items() if value != dtype))


def _cell(row: report.Row | None) -> str:
    if row is None:
        return ""
    floor = f" ({row['floor'] / row['seconds']:.0%})" if row["floor"] else ""
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
