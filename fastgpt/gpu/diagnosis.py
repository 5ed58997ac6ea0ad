"""Why a kernel breaks its budget: the instructions or values concerned, by the source line that they come from."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastgpt.gpu import tools
from fastgpt.gpu.budget import Violation
from fastgpt.gpu.code import CSRC, ROOT, Instruction, compile_cubin, instructions, matches, short_name
from fastgpt.gpu.occupancy import ARCHITECTURES

MOST_LINES = 8  # of source, for one violation
Place = tuple[tuple[str, int], ...]


def build_flags(source: Path) -> list[str]:
    """The flags that the last build compiled a .cu file with, without its input, output and architectures.

    Raises:
        ValueError: no build in this checkout compiled that file with nvcc.
    """
    source = source.resolve()
    found = []
    for database in ROOT.glob("build/cmake-*/compile_commands.json"):
        for entry in json.loads(database.read_text()):
            words = shlex.split(entry["command"])
            compiler = next((i for i, word in enumerate(words[:3]) if Path(word).name == "nvcc"), None)
            if Path(entry["file"]) == source and compiler is not None:
                found.append((database.stat().st_mtime, words[compiler + 1 :]))
    if not found:
        raise ValueError(f"no build here has compiled {source.name} with nvcc: build with FASTGPT_CUDA=on first")
    flags: list[str] = []
    words = max(found)[1]
    for previous, word in zip(["", *words], words, strict=False):
        of_this_output = previous in ("-x", "-o", "-MF", "-MT") or word in ("-x", "-o", "-MF", "-MT", "-c", "-MD")
        of_target = word.startswith(("--generate-code", "-gencode", "-Werror"))
        if not (of_this_output or of_target or word == "-forward-unknown-to-host-compiler") and Path(word) != source:
            flags.append(word)
    return flags


def _source_line(place: tuple[str, int]) -> str:
    path, line = Path(place[0]), place[1]
    try:
        text = path.read_text().splitlines()[line - 1].strip()
    except (OSError, IndexError):
        text = ""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown}:{line}: {text}"


def _lines_by_place(found: Sequence[tuple[Instruction, int]], unit: str) -> Iterator[str]:
    """The most frequent (or, for live registers, fullest) source lines, each with one of its instructions."""
    total: Counter[Place] = Counter()
    example: dict[Place, Instruction] = {}
    for instruction, weight in found:
        place = instruction.place
        total[place] = max(total[place], weight) if unit == "live registers" else total[place] + weight
        if place not in example or total[place] == weight:
            example[place] = instruction
    for place, count in total.most_common(MOST_LINES):
        where = _source_line(place[0]) if place else "(compiled without source lines)"
        yield f"  {count} {unit} at {where}"
        for caller in place[1:]:
            yield f"      inlined into {_source_line(caller)}"
        yield f"      /*{example[place].address:04x}*/ {example[place].text}"
    if len(total) > MOST_LINES:
        yield f"  and {len(total) - MOST_LINES} more source lines"


def live_registers(cubin: Path) -> dict[tuple[str, int], int]:
    """(mangled kernel, address) -> registers that hold a value there."""
    live: dict[tuple[str, int], int] = {}
    kernel = ""
    for text in tools.run("nvdisasm", "-c", "-plr", "-lrm", "count", cubin).splitlines():
        if found := re.match(r"^\s*\.section\s+\.text\.([^,\s]+)", text):
            kernel = found[1]
        elif found := re.match(r"^\s+/\*([0-9a-f]{4,})\*/.*//\s*\|\s*(\d+)", text):
            live[kernel, int(found[1], 16)] = int(found[2])
    return live


def explain(violation: Violation, cubins: Mapping[tuple[str, int], Path] | None = None) -> Iterator[str]:
    """The violation, what usually causes it, and the source lines concerned.

    Args:
        cubins: (kernel, architecture) -> code with line numbers, as Triton's has; a CUDA kernel is compiled anew.
    """
    yield str(violation)
    yield f"  usual cause: {violation.cause}"
    if violation.what not in ("instructions", "registers", "stack", "blocks") or not violation.architectures:
        return
    architecture = violation.architectures[0]
    patterns = violation.patterns or (("LDL", "STL") if violation.what == "stack" else ())
    if cubins is None:
        source = CSRC / "cuda" / f"{violation.source}.cu"
        yield from source_lines(source, violation.kernel, architecture, patterns)
    elif cubin := cubins.get((violation.kernel, architecture)):
        yield from _cubin_lines(cubin, "*", architecture, patterns)


def source_lines(
    source: Path, kernel: str, architecture: int, patterns: Sequence[str] = (), flags: Sequence[str] | None = None
) -> Iterator[str]:
    """Where a kernel's instructions of some kinds come from; without ``patterns``, where most registers are live."""
    if flags is None:
        flags = build_flags(source)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        compile_cubin(source, architecture, cubin, flags, strict=False)
        yield from _cubin_lines(cubin, kernel, architecture, patterns)


def _cubin_lines(cubin: Path, kernel: str, architecture: int, patterns: Sequence[str]) -> Iterator[str]:
    mine = [i for i in instructions(cubin, lines=True) if fnmatchcase(short_name(i.kernel), kernel)]
    yield f"  on {ARCHITECTURES[architecture].name}, by source line:"
    if patterns:
        found = [(i, 1) for i in mine if any(matches(i.opcode, pattern) for pattern in patterns)]
        yield from _lines_by_place(found, f"x {', '.join(patterns)}")
    else:
        live = live_registers(cubin)
        yield from _lines_by_place([(i, live.get((i.kernel, i.address), 0)) for i in mine], "live registers")
