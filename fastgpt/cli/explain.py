"""``fastgpt explain``: which backend owns each operator, or what each compiled CUDA kernel uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

import fastgpt
from fastgpt.cli.errors import plain_errors
from fastgpt.gpu import budget, code
from fastgpt.gpu.code import Kernel
from fastgpt.gpu.occupancy import ARCHITECTURES
from fastgpt.ops.native import _C, cuda_summary

BUDGET = code.CSRC / "cuda" / "budget.toml"
# What was disassembled once is remembered: beside the build, or with the user's other caches.
CACHE = (
    code.ROOT / "build" / "gate"
    if code.CSRC.is_dir()
    else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
)
# Instructions that tell a kernel's quality, and the widths worth telling apart.
_SHOWN: dict[str, tuple[str, ...]] = dict.fromkeys(("HMMA", "LDSM", "LDGSTS"), ())
_SHOWN |= dict.fromkeys(("LDG", "STG", "LDS", "STS"), ("128", "64", "U16", "U8"))
_SHOWN |= dict.fromkeys(("LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED", "SHFL", "BAR", "MUFU"), ())
_DOUBLES = ("DADD", "DMUL", "DFMA", "DSETP")


def compiled_kernels(also: Sequence[int] = (), only: Sequence[int] = ()) -> list[Kernel]:
    """The kernels of this build.

    Raises:
        ValueError: CUDA is not in this build.
        ToolMissingError: NVIDIA's disassembler is not on this machine.
    """
    if not _C.cuda.compiled:
        raise ValueError(f"there are no compiled CUDA kernels here: CUDA was {cuda_summary()}")
    return code.read_module(Path(_C.__file__), also=also, only=only, cache=CACHE)


def _instructions(kernel: Kernel) -> str:
    """As in ``LDG 24 (128: 8, U16: 16), BAR 4``."""
    out = []
    for name, widths in _SHOWN.items():
        if total := kernel.count(name):
            parts = [f"{width}: {n}" for width in widths if (n := kernel.count(f"{name}.{width}"))]
            out.append(f"{name} {total}" + (f" ({', '.join(parts)})" if parts else ""))
    if doubles := sum(map(kernel.count, _DOUBLES)):
        out.append(f"FP64 {doubles}")
    return ", ".join(out)


def table(kernels: Sequence[Kernel], limits: budget.Budget | None) -> list[str]:
    """One line a kernel and architecture, in aligned columns."""
    head = (
        "kernel",
        "arch",
        "registers",
        "shared",
        "dynamic",
        "local",
        "threads",
        "blocks/SM",
        "limited by",
        "instructions",
    )
    rows = []
    for kernel in kernels:
        known = limits.kernels.get(kernel.name) if limits else None
        threads = known.threads if known else kernel.threads or 1024
        dynamic = known.dynamic if known else 0
        found = budget.occupancy_of(kernel, kernel.architecture, threads=threads, dynamic=dynamic)
        rows.append(
            (
                kernel.name,
                ARCHITECTURES[kernel.architecture].name if kernel.architecture in ARCHITECTURES else "?",
                str(kernel.registers),
                str(kernel.shared),
                str(dynamic) if known else "?",
                str(kernel.stack),
                str(threads),
                f"{found.blocks} ({found.fraction:.0%})",
                found.limit,
                f"{kernel.instructions}: {_instructions(kernel)}",
            )
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def explain(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="List the compiled CUDA kernels and what each uses, per architecture.")
    ] = False,
    match: Annotated[
        str, typer.Option(help="Only kernels whose name fits this shell pattern.", metavar="PATTERN")
    ] = "*",
    arch: Annotated[
        list[int] | None,
        typer.Option(help="Only this architecture, as 80 or 90. Repeat it for more.", metavar="NUMBER"),
    ] = None,
) -> None:
    """Print which backend owns each operator and why; or what the compiled CUDA kernels are made of.

    Registers are a thread's; shared (static), dynamic and local memory in bytes, of a block, a block and a thread.
    Blocks/SM: how many an SM holds at once, how much of its threads they are, and what keeps it from holding more.
    """
    if not kernels:
        fastgpt.explain()
        return
    with plain_errors():
        if unknown := [number for number in arch or () if number not in ARCHITECTURES]:
            raise ValueError(f"--arch {unknown[0]}: allowed are {', '.join(map(str, ARCHITECTURES))}")
        found = [kernel for kernel in compiled_kernels(only=arch or ()) if fnmatchcase(kernel.name, match)]
        if not found:
            raise ValueError(f"this build ({cuda_summary()}) has no kernel that fits --match {match!r} and --arch")
        limits = budget.load(BUDGET) if BUDGET.exists() else None
        if limits is None:
            print("Dynamic shared memory is known in a source checkout only; blocks/SM are counted without it.\n")
        print("\n".join(table(found, limits)))
