"""``fastgpt gpu``: on a machine with an NVIDIA GPU, builds, tests, sanitizes and benchmarks; writes one report."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastgpt
from fastgpt.cli.errors import plain_errors
from fastgpt.files import atomic_write
from fastgpt.gpu.code import ROOT

# Under compute-sanitizer a test takes minutes: one small case of every operator, forward and backward.
SANITIZED = ["tests/test_cuda_graph.py", "-k", "eager and not triton"]
# On a machine with a GPU the Triton kernels run there, with no interpreter.
TRITON_TESTS = ["tests/ops", "tests/test_triton_gpt.py", "-k", "triton"]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Part(str, Enum):
    build = "build"
    tests = "tests"
    sanitizer = "sanitizer"
    benchmarks = "benchmarks"


@dataclass(frozen=True)
class Step:
    """One thing that was run. ``status``: its exit status, or None where it could not be run; ``summary`` says why."""

    name: str
    status: int | None
    seconds: float
    summary: str


def run_step(name: str, command: Sequence[str], environment: Mapping[str, str], logs: Path) -> Step:
    """Runs a command in the checkout, shows and keeps its output, and takes its last line for the summary."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    last = ""
    with (
        open(logs / f"{name.replace(' ', '-')}.log", "w") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            last = line.strip() or last
    return Step(name, process.returncode, time.monotonic() - start, last)


def about() -> dict[str, str]:
    """What the report is about: the device, the driver, versions."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, text=True, capture_output=True).stdout.strip() if shutil.which("nvidia-smi") else "?"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, capture_output=True
    ).stdout.strip()
    found = {
        "device": f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs, {properties.total_memory >> 20} MiB",
        "driver": driver,
        "fastgpt": f"{fastgpt.__version__} ({commit})",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "python": platform.python_version(),
    }
    for package in ("triton", "flash-attn", "liger-kernel"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _benchmark_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = {"cuda": "CUDA", "triton": "Triton", "torch": "torch"}
    lines: list[str] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        lines += [
            "",
            f"### {shape}",
            "",
            f"| case | owner | {' | '.join(columns.values())} | of the floor | the owner is | failed or missing |",
        ]
        lines.append("| --- " * (len(columns) + 5) + "|")
        for row in (row for row in rows if row["shape"] == shape):
            ours = row["seconds"].get(row["owner"])
            peers = {columns.get(n, n): seconds for n, seconds in row["seconds"].items() if n != row["owner"]}
            cells = [
                row["case"],
                columns.get(row["owner"], row["owner"]),
                *(_duration(row["seconds"][name]) if name in row["seconds"] else "-" for name in columns),
                f"{row['floor'] / ours:.0%}".replace("%", " %") if ours and row["floor"] else "",
                ", ".join(f"{seconds / ours:.2f}x {name}" for name, seconds in peers.items()) if ours else "",
                "; ".join(f"{name}: {why}" for name, why in {**row["failed"], **row["missing"]}.items()),
            ]
            lines.append(re.sub(r" +\|", " |", "| " + " | ".join(cells) + " |"))
    return lines


def write_report(
    path: Path, about: Mapping[str, str], steps: Sequence[Step], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the report, in Markdown."""
    lines = ["# fastgpt on a GPU", "", "Written by `make gpu`.", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in about.items()]
    lines += ["", "## Steps", "", "| step | result | time | last line |", "| --- | --- | --- | --- |"]
    for step in steps:
        result = "passed" if step.status == 0 else f"**failed** (status {step.status})"
        summary = step.summary.replace("|", "\\|")
        lines.append(
            f"| {step.name} | not run | | {summary} |"
            if step.status is None
            else f"| {step.name} | {result} | {step.seconds:.0f} s | {summary} |"
        )
    if rows:
        lines += [
            "",
            "## Benchmarks",
            "",
            "bfloat16; medians of interleaved rounds by CUDA events, with a cold L2 cache.",
        ]
        lines += [
            "The owner runs by default on this GPU; a ratio above 1 means that it is faster.",
            "The floor is that of docs/predictions.md.",
        ]
        lines += _benchmark_lines(rows)
    with atomic_write(path) as file:
        file.write("\n".join(lines) + "\n")


def _build(everything: bool, logs: Path) -> Step:
    environment = {"FASTGPT_CUDA": "on"}
    if not everything and "FASTGPT_CUDA_ARCHS" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        environment["FASTGPT_CUDA_ARCHS"] = f"{major}{minor}-real"
    return run_step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment, logs)


def _sanitize(logs: Path) -> list[Step]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [
            Step("compute-sanitizer", None, 0, "compute-sanitizer was not found on PATH (it is in the CUDA toolkit)")
        ]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *SANITIZED]
    # Without torch's cache every tensor is an allocation of its own, whose bounds the sanitizer knows.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        run_step(
            f"compute-sanitizer {tool}",
            [program, f"--tool={tool}", "--error-exitcode=1", "--kernel-regex=kns=fastgpt", *tests],
            environment,
            logs,
        )
        for tool in SANITIZERS
    ]


def gpu(
    output: Annotated[Path, typer.Option(help="The report. Logs of the steps go beside it.")] = ROOT / "results/gpu.md",
    skip: Annotated[list[Part] | None, typer.Option(help="Leave a step out. Repeat it for more.")] = None,
    all_architectures: Annotated[
        bool, typer.Option("--all-architectures", help="Build for every GPU, not only for the one here (minutes).")
    ] = False,
) -> None:
    """On a machine with an NVIDIA GPU: build, run the operators' tests, compute-sanitizer and benchmarks, and report.

    Ends with status 1 if there is no GPU, or if a step failed; the report is written all the same.
    """
    with plain_errors():
        if not (ROOT / "benchmarks").is_dir():
            raise ValueError("the tests and benchmarks live in a source checkout of fastgpt; this is an installed copy")
        if not torch.cuda.is_available():
            why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds none"
            raise ValueError(f"there is no GPU to run on: {why}; nothing was built or measured")
        output.parent.mkdir(parents=True, exist_ok=True)
        left_out = set(skip or ())
        steps: list[Step] = []
        rows: list[dict[str, Any]] = []
        if Part.build not in left_out:
            steps.append(_build(all_architectures, output.parent))
        if all(step.status == 0 for step in steps):
            if Part.tests not in left_out:
                command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--benchmark-disable"]
                steps.append(run_step("tests", command, {}, output.parent))
                command = [sys.executable, "-m", "pytest", "-q", *TRITON_TESTS, "--benchmark-disable"]
                steps.append(run_step("Triton tests", command, {}, output.parent))
            if Part.sanitizer not in left_out:
                steps += _sanitize(output.parent)
            if Part.benchmarks not in left_out:
                with tempfile.TemporaryDirectory() as folder:
                    measured = Path(folder) / "rows.json"
                    command = [sys.executable, "-m", "benchmarks.gpu", f"--output={measured}"]
                    steps.append(run_step("benchmarks", command, {}, output.parent))
                    rows = json.loads(measured.read_text()) if measured.exists() else []
        write_report(output, about(), steps, rows)
        print(f"\nwrote {output}")
        if any(step.status not in (0, None) for step in steps):
            raise typer.Exit(1)
