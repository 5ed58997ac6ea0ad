"""Reads compiled CUDA kernels: out of a module that was built, out of cubins, out of PTX for one more architecture.

A kernel goes by the short name that the emulator gives it too: ``rotary_kernel<bf16, float>``.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from fastgpt.gpu import tools
from fastgpt.gpu.occupancy import SHARED_RESERVED

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
# The code of the first runs on the second, too.
RUNS_ALSO_ON = {80: (86, 89)}
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled for one architecture. Bytes are of shared memory a block (static), and of stack a thread
    (arrays with run-time indices, and registers spilt). ``threads``: the launch bound, or None. ``runs_also_on``: other
    architectures that run this code, where they have none of their own."""

    name: str
    source: str  # the stem of its file
    architecture: int
    registers: int
    shared: int
    stack: int
    threads: int | None
    opcodes: dict[str, int]
    runs_also_on: tuple[int, ...] = ()

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, pattern: str) -> int:
        """How many instructions ``pattern`` stands for (see ``matches``)."""
        return sum(n for opcode, n in self.opcodes.items() if matches(opcode, pattern))


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction; ``place``: its source line, then the line that was inlined into, and so on."""

    kernel: str
    address: int
    opcode: str
    text: str
    place: tuple[tuple[str, int], ...] = ()


def matches(opcode: str, pattern: str) -> bool:
    """Whether an opcode is of the kind ``pattern``: the same instruction, with at least the pattern's modifiers.

    ``LDG.E.128.CONSTANT`` is an ``LDG.128`` and an ``LDG``, not an ``LDG.64``.
    """
    name, *modifiers = opcode.split(".")
    wanted, *wanted_modifiers = pattern.split(".")
    return name == wanted and set(wanted_modifiers) <= set(modifiers)


# --- names ---


@functools.cache
def _demangle() -> Callable[[str], str]:
    """libstdc++'s own, which every C++ program on Linux has; the name as it is where there is none."""
    try:
        function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
        free = ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return lambda name: name
    function.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def demangle(name: str) -> str:
        status = ctypes.c_int()
        address = function(name.encode(), None, None, ctypes.byref(status))
        if not address:
            return name
        try:
            return (ctypes.string_at(address) or b"").decode()
        finally:
            free(address)

    return demangle


def short_name(mangled: str) -> str:
    """``rotary_kernel<bf16, float>``, without result, parameters, namespaces and casts."""
    text = _demangle()(mangled).replace("(anonymous namespace)", "anonymous")
    if text == mangled:
        return mangled
    depth, end = 0, len(text)
    for i in range(len(text) - 1, -1, -1):  # the parameter list is the last thing in parentheses
        depth += (text[i] == ")") - (text[i] == "(")
        if text[i] == "(" and depth == 0:
            end = i
            break
    text = re.sub(r"\([^()]*\)", "", text[:end])  # casts of template arguments: (Mode)1
    text = re.sub(r"\b(\d+)[ul]+\b", r"\1", text)  # 4u
    text = re.sub(r"(\w+::)+", "", text)
    before, bracket, arguments = text.partition("<")
    return before.split()[-1] + bracket + arguments


def source_of(mangled: str) -> str:
    """The stem of the .cu file whose anonymous namespace holds the kernel, or ``?``."""
    # _GLOBAL__N__<8 digits>_<length>_<file, with _ for every other sign>_...
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_(\d+)_", mangled)
    return mangled[found.end() : found.end() + int(found[1])].removesuffix("_cu") if found else "?"


# --- one cubin ---

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_PLACE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)[^;]*);")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_ATTRIBUTES = re.compile(
    r"^\.nv\.info\.(\S+)|EIATTR_MAX_THREADS\s+Format:\s*EIFMT_SVAL\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)", re.M
)


def instructions(cubin: Path, *, lines: bool = False) -> Iterator[Instruction]:
    """The SASS of a cubin, with source lines if ``lines`` (and if it was compiled with -lineinfo)."""
    kernel, inlined = "", False
    place: list[tuple[str, int]] = []
    for text in tools.run("nvdisasm", "-c", "-ndf", *(["-gi"] if lines else []), cubin).splitlines():
        if found := _INSTRUCTION.match(text):
            yield Instruction(kernel, int(found[1], 16), found[3], found[2].strip(), tuple(place))
        elif found := _PLACE.match(text):
            here = (found[1], int(found[2]))
            place = [*place, here] if inlined else [here]
            inlined = found[3] is not None
        elif found := _SECTION.match(text):
            kernel, place, inlined = found[1], [], False


def _machine_code(cubin: Path) -> Iterator[tuple[str, bytes]]:
    """The kernels of a cubin, an ELF file: their mangled names and instructions."""
    data = cubin.read_bytes()
    (headers,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, headers + i * size) for i in range(number)]
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        title = data[start : data.index(b"\0", start)].decode()
        if title.startswith(".text."):
            yield title.removeprefix(".text."), data[offset : offset + length]


def _opcodes(cubins: Iterable[Path], architecture: int) -> dict[tuple[Path, str], Counter[str]]:
    """(cubin, mangled name) -> how many of each instruction. All at once, as plain machine code: nvdisasm takes 0.3
    seconds to start, and next to nothing for a kernel."""
    pieces = [((cubin, name), text) for cubin in cubins for name, text in _machine_code(cubin)]
    counts = {key: Counter[str]() for key, _ in pieces}
    ends = list(itertools.accumulate(len(text) for _, text in pieces))
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(text for _, text in pieces))
        file.flush()
        for line in tools.run("nvdisasm", "-b", f"SM{architecture}", "-ndf", file.name).splitlines():
            if found := _INSTRUCTION.match(line):
                key, _ = pieces[bisect.bisect_right(ends, int(found[1], 16))]
                counts[key][found[3]] += 1
    return counts


def _resources(cubin: Path) -> list[Kernel]:
    """The kernels in a cubin, but for their instructions."""
    usage = _USAGE.findall(tools.run("cuobjdump", "-res-usage", cubin))
    if not usage:
        return []
    dump = tools.run("cuobjdump", "-elf", cubin)
    found = re.search(r"\bsm=(\d+)", dump)
    if not found:
        raise ValueError(f"{cubin}: cuobjdump does not say which architecture it is for")
    architecture = int(found[1])
    bounds: dict[str, int] = {}
    name = ""
    for section, x, y, z in _ATTRIBUTES.findall(dump):
        if section:
            name = section
        else:
            bounds[name] = int(x, 16) * int(y, 16) * int(z, 16)
    return [
        Kernel(
            name=mangled,
            source=source_of(mangled),
            architecture=architecture,
            registers=int(registers),
            # From sm_90 on the figure holds what the system reserves, if the kernel has any shared memory of its own.
            shared=max(int(shared) - SHARED_RESERVED, 0) if architecture >= 90 else int(shared),
            stack=int(stack),
            threads=bounds.get(mangled),
            opcodes={},
            runs_also_on=RUNS_ALSO_ON.get(architecture, ()),
        )
        for mangled, registers, stack, shared in usage
    ]


def read_cubins(cubins: Sequence[Path]) -> list[list[Kernel]]:
    """The kernels in each cubin."""
    found = [_resources(cubin) for cubin in cubins]
    opcodes: dict[tuple[Path, str], Counter[str]] = {}
    for architecture in sorted({kernel.architecture for kernels in found for kernel in kernels}):
        own = [
            cubin for cubin, ks in zip(cubins, found, strict=True) if any(k.architecture == architecture for k in ks)
        ]
        opcodes |= _opcodes(own, architecture)
    return [
        [replace(k, name=short_name(k.name), opcodes=dict(sorted(opcodes[cubin, k.name].items()))) for k in kernels]
        for cubin, kernels in zip(cubins, found, strict=True)
    ]


# --- a whole build ---


def _parallel(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(function, items))


def read_cached(cubins: Sequence[Path], cache: Path | None) -> list[list[Kernel]]:
    """``read_cubins``, where ``cache`` (a folder, or None) does not know the answer."""
    if cache is None:
        return read_cubins(cubins)
    # What is read depends on the code, on the program that disassembles it, and on this file.
    reader = tools.version("nvdisasm").encode() + Path(__file__).read_bytes()
    known = [cache / f"{hashlib.sha256(cubin.read_bytes() + reader).hexdigest()[:32]}.json" for cubin in cubins]
    missing = [(cubin, file) for cubin, file in zip(cubins, known, strict=True) if not file.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    for (_, file), kernels in zip(missing, read_cubins([cubin for cubin, _ in missing]), strict=True):
        written = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        written.write_text(json.dumps([asdict(kernel) for kernel in kernels]))
        written.replace(file)
    return [
        [Kernel(**{**fields, "runs_also_on": tuple(fields["runs_also_on"])}) for fields in json.loads(file.read_text())]
        for file in known
    ]


def _assemble(ptx: Path, architecture: int, folder: Path, cache: Path | None) -> Path:
    """The cubin of a PTX file for an architecture."""
    cubin = folder / f"{ptx.stem}.to_sm_{architecture}.cubin"
    if cache is not None:
        key = hashlib.sha256(ptx.read_bytes() + tools.version("ptxas").encode()).hexdigest()[:32]
        cubin = cache / f"{key}.sm_{architecture}.cubin"
        if cubin.exists():
            return cubin
        cache.mkdir(parents=True, exist_ok=True)
    written = cubin.with_suffix(f".{os.getpid()}")
    tools.run("ptxas", f"-arch=sm_{architecture}", ptx, "-o", written)
    written.replace(cubin)
    return cubin


def read_module(
    module: Path, *, also: Sequence[int] = (), only: Sequence[int] = (), cache: Path | None = None
) -> list[Kernel]:
    """Every kernel in a shared library, sorted by source, name and architecture.

    Args:
        module: the library.
        also: further architectures, which its PTX is assembled for (sm_86 and sm_89 run sm_80's code, but have less
            shared memory and fewer threads; a build narrowed to them has code of its own).
        only: skip the code of other architectures, if given.
        cache: a folder that remembers what was read.

    Raises:
        ToolMissingError: cuobjdump or nvdisasm (or ptxas, for ``also``) is not on this machine.
        ValueError: ``also`` is asked of a library that holds no PTX.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools.run("cuobjdump", "-xelf", "all", module.resolve(), cwd=folder)
        cubins = [path for n in only or ("*",) for path in sorted(folder.glob(f"*.sm_{n}.cubin"))]
        if also:
            tools.run("cuobjdump", "-xptx", "all", module.resolve(), cwd=folder)
            sources = [ptx for ptx in sorted(folder.glob("*.ptx")) if ".entry" in ptx.read_text()]
            if not sources:
                raise ValueError(f"{module.name} holds no PTX to assemble for {', '.join(f'sm_{n}' for n in also)}")
            cubins += _parallel(
                lambda job: _assemble(*job, folder, cache), [(ptx, number) for ptx in sources for number in also]
            )
        kernels = [kernel for found in _parallel(lambda c: read_cached([c], cache), cubins) for kernel in found[0]]
    return sorted(kernels, key=lambda k: (k.source, k.name, k.architecture))


def compile_cubin(
    source: Path, architecture: int, output: Path, flags: Sequence[str] = (), *, strict: bool = True
) -> None:
    """Compiles a .cu file with source lines; if ``strict``, warnings, spills and local memory are errors.

    Raises:
        ToolMissingError: nvcc is not on this machine.
        ValueError: nvcc refused it; the message is what it printed.
    """
    options = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage"] if strict else []
    tools.run("nvcc", *flags, *options, "-lineinfo", f"-arch=sm_{architecture}", "-cubin", "-o", output, source)
