"""``fastgpt explain``: which backend owns each operator, or what each compiled CUDA and Triton kernel uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

import fastgpt
from fastgpt.cli.errors import plain_errors
from fastgpt.gpu import budget, code, triton_build
from fastgpt.gpu.code import Kernel
from fastgpt.gpu.occupancy import ARCHITECTURES
from fastgpt.ops.native import _C, NO_TRITON, cuda_summary


class Kind(str, Enum):
    cuda = "cuda"
    triton = "triton"


BUDGETS = {Kind.cuda: code.CSRC / "cuda" / "budget.toml", Kind.triton: code.ROOT / "kernels" / "budget.toml"}
# What was disassembled once is remembered: beside the build, or with the user's other caches.
CACHE = (
    code.ROOT / "build" / "gate"
    if code.CSRC.is_dir()
    else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"
)
# Instructions that tell a kernel's quality, and the widths worth telling apart.
_SHOWN: dict[str, tuple[str, ...]] = dict.fromkeys(("HMMA", "HGMMA", "UTCHMMA", "LDSM", "LDGSTS", "UTMALDG"), ())
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


def compiled_triton(architectures: Sequence[str]) -> list[triton_build.Compiled]:
    """The Triton kernels, compiled for these architectures (sm_80, ..., gfx942), in every configuration.

    Raises:
        ValueError: Triton is not installed.
        ToolMissingError: NVIDIA's disassembler is not on this machine.
    """
    if NO_TRITON:
        raise ValueError(f"there are no Triton kernels to compile here: {NO_TRITON}")
    print("compiling the Triton kernels (a minute or two the first time)", file=sys.stderr, flush=True)
    return triton_build.build(architectures, CACHE)


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
        bool, typer.Option("--kernels", help="List the compiled kernels and what each uses, per architecture.")
    ] = False,
    match: Annotated[
        str, typer.Option(help="Only kernels whose name fits this shell pattern.", metavar="PATTERN")
    ] = "*",
    arch: Annotated[
        list[int] | None,
        typer.Option(help="Only this architecture, as 80 or 90. Repeat it for more.", metavar="NUMBER"),
    ] = None,
    only: Annotated[Kind | None, typer.Option(help="With --kernels: only these.")] = None,
) -> None:
    """Print which backend owns each operator and why; or what the compiled kernels are made of.

    Registers are a thread's; shared (static), dynamic and local memory in bytes, of a block, a block and a thread.
    Blocks/SM: how many an SM holds at once, how much of its threads they are, and what keeps it from holding more.
    """
    if not kernels:
        fastgpt.explain()
        return
    with plain_errors():
        if unknown := [number for number in arch or () if number not in ARCHITECTURES]:
            raise ValueError(f"--arch {unknown[0]}: allowed are {', '.join(map(str, ARCHITECTURES))}")
        kinds = [only] if only else list(Kind)
        if only is None and not _C.cuda.compiled:
            print(f"CUDA kernels: {cuda_summary()}\n")
            kinds.remove(Kind.cuda)
        if only is None and NO_TRITON:
            print(f"Triton kernels: {NO_TRITON}\n")
            kinds.remove(Kind.triton)
        found = {kind: [k for k in _kernels(kind, arch or ()) if fnmatchcase(k.name, match)] for kind in kinds}
        if not any(found.values()):
            raise ValueError(f"this build ({cuda_summary()}) has no kernel that fits --match {match!r} and --arch")
        for kind, kernels_here in found.items():
            limits = budget.load(BUDGETS[kind]) if BUDGETS[kind].exists() else None
            if limits is None and kind is Kind.cuda:
                print("Dynamic shared memory is known in a source checkout only; blocks/SM are counted without it.\n")
            if kernels_here:
                print("\n".join(table(kernels_here, limits)))


def _kernels(kind: Kind, architectures: Sequence[int]) -> list[Kernel]:
    if kind is Kind.cuda:
        return compiled_kernels(only=architectures)
    names = [f"sm_{number}" for number in architectures or ARCHITECTURES]
    return [c.kernel for c in compiled_triton(names) if c.kernel is not None]
