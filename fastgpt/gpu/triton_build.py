"""Compiles the Triton kernels for every architecture, without a GPU, and reads the result like a CUDA build.

The calls of ``catalogue`` are recorded in worker processes of their own, and each launch of theirs is compiled with
every configuration that it can choose. A kernel's name holds what it was compiled from::

    swiglu_forward_kernel<bf16, ROWS=1 COLS=2048 warps=4 stages=2>

which is the kernel, the case of the catalogue that first needed it, and the configuration.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from fastgpt.gpu import budget, catalogue, code
from fastgpt.gpu.budget import Violation
from fastgpt.gpu.occupancy import ARCHITECTURES, WARP
from fastgpt.ops import native

AMD = "gfx942"
AMD_SHARED = 64 << 10  # bytes of LDS that a block may have
_AT_ONCE = 16  # jobs: few enough for two processes to end together, many for what reads them together
# An architecture runs the same code as the one before it in its row, where both have the same configurations.
_SAME_CODE = {86: 80, 89: 86}
CAUSES = {
    "compile": "Triton refuses the kernel with these dtypes, options or block sizes",
    "amd": "block sizes that fit NVIDIA's register file and shared memory, not AMD's: give the target its own",
}


@dataclass(frozen=True)
class Compiled:
    """One variant. For NVIDIA ``kernel`` and ``cubin``, for AMD ``amd``, its figures; or the reason in ``failed``."""

    name: str
    source: str
    architecture: str
    default: bool
    kernel: code.Kernel | None = None
    cubin: Path | None = None
    amd: dict[str, int] | None = None
    failed: str = ""


# --- in a worker process ---


@dataclass(frozen=True)
class _Job:
    name: str
    variant: Any  # fastgpt.kernels.compile.Variant
    runs_also_on: tuple[int, ...]


_jobs: list[_Job] = []
_refused: list[Compiled] = []  # cases that their operator refused


def _start(operators: Sequence[str], architectures: Sequence[str]) -> None:
    """Records the catalogue, and lists what is to be compiled: the same list in every worker."""
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)  # Triton prints pages where a compilation fails; errors come as such
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    from fastgpt.kernels.launch import recording

    recorded = []
    with native.triton_on_cpu():
        for case in catalogue.cases():
            if case.op in operators:
                with recording() as launches:
                    try:
                        case.call()
                    except Exception as error:  # the report says it, and goes on
                        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                        _refused.append(Compiled(f"{case.op}<{case.label}>", case.op, "", True, failed=why))
                recorded += [(case, launch) for launch in launches]
    _jobs[:] = _list_jobs(recorded, architectures)


def _list_jobs(recorded: Sequence[tuple[catalogue.Case, Any]], architectures: Sequence[str]) -> Iterator[_Job]:
    from fastgpt.kernels.compile import target_of, variants

    targets = {name: target_of(name) for name in architectures}
    for target in targets.values():
        seen: set[str] = set()
        names: dict[str, int] = {}
        for case, launch in recorded:
            if target.backend == "cuda" and _shared_with(launch, target.arch, targets):
                continue
            for variant in variants(launch, target):
                if variant.key in seen:
                    continue
                seen.add(variant.key)
                # A kernel that several operators share says whose call it was.
                label = case.label if variant.name.startswith(f"{case.op}_") else f"{case.op} {case.label}"
                full = f"{variant.name}<{label}, {variant.configuration}>"
                names[full] = names.get(full, 0) + 1
                if names[full] > 1:  # one case launches the kernel more than once, differently
                    full = f"{full[:-1]}, launch {names[full]}>"
                also = [n for n in _SAME_CODE if _runs_code_of(launch, n, target.arch)]
                yield _Job(full, variant, tuple(also))


def _runs_code_of(launch: Any, number: int, other: Any) -> bool:
    """Whether the launch, on architecture ``number``, has the code that is compiled for ``other``."""
    from fastgpt.kernels.compile import target_of

    if number not in _SAME_CODE or number == other:
        return number == other
    before = _SAME_CODE[number]
    mine, theirs = (list(map(str, launch.configs(target_of(f"sm_{n}")))) for n in (number, before))
    return mine == theirs and _runs_code_of(launch, before, other)


def _shared_with(launch: Any, number: int, targets: Iterable[str]) -> bool:
    """Whether the launch has, on architecture ``number``, the code of another one that is compiled as well."""
    others = (int(name.removeprefix("sm_")) for name in targets if name.startswith("sm_"))
    return any(other < number and _runs_code_of(launch, number, other) for other in others)


def _listed() -> tuple[int, list[Compiled]]:
    return len(_jobs), _refused


def _compile(indices: Sequence[int], cache: Path) -> list[Compiled]:
    """Compiles some of the jobs, and reads what became of them."""
    from fastgpt.kernels.compile import compiled

    jobs = [_jobs[index] for index in indices]

    def attempt(some: Sequence[_Job]) -> None:
        for job in some:
            with contextlib.suppress(Exception):  # the parent meets it again
                compiled(job.variant)

    aborts = _tried_aside(lambda: attempt(jobs)) != 0
    found = [_compiled(job, _tried_aside(lambda job=job: attempt([job])) if aborts else 0) for job in jobs]  # type: ignore[misc]
    built = [(n, c.cubin) for n, c in enumerate(found) if c.cubin is not None]
    for (n, _), (kernel,) in zip(built, code.read_cached([cubin for _, cubin in built], cache), strict=True):
        job, variant = jobs[n], jobs[n].variant
        metadata = compiled(variant).metadata  # from Triton's cache
        kernel = replace(
            kernel,
            name=job.name,
            source=variant.file,
            shared=metadata.shared,  # all of it is dynamic, and known when compiled
            threads=kernel.threads or metadata.num_warps * WARP,
            runs_also_on=job.runs_also_on,
        )
        found[n] = replace(found[n], kernel=kernel)
    return found


def _compiled(job: _Job, signal: int) -> Compiled:
    """One job whose compilation was tried aside, and ended with ``signal`` or 0; its cubin is not read yet."""
    from fastgpt.kernels.compile import binary, compiled

    variant = job.variant
    nvidia = variant.target.backend == "cuda"
    name = f"sm_{variant.target.arch}" if nvidia else variant.target.arch
    result = Compiled(job.name, variant.file, name, variant.default)
    if signal:
        return replace(result, failed=f"the compiler itself ended with signal {signal}")
    try:
        built = compiled(variant)  # from Triton's cache
    except Exception as error:  # whatever Triton raises: the report says it
        return replace(result, failed=" ".join(f"{type(error).__name__}: {error}".split())[:400])
    if not nvidia:
        return replace(result, amd=amd_figures(built.asm["amdgcn"], built.metadata.shared))
    return replace(result, cubin=binary(built, "cubin"))


def _tried_aside(attempt: Callable[[], Any]) -> int:
    """The signal that ends ``attempt`` in a child process, or 0: a failed assertion in LLVM ends the whole process, and
    a failed pass prints pages."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    with contextlib.suppress(BaseException):  # the parent meets it again
        attempt()
    os._exit(0)


def amd_figures(assembly: str, shared: int) -> dict[str, int]:
    """Registers, what of them was spilt, and shared memory of an AMD kernel, from its assembly's metadata."""
    found = dict(re.findall(r"^\s*\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly, re.M))
    return {**{name: int(value) for name, value in found.items()}, "shared": shared}


# --- in the gate's own process ---


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """The environment of workers: without the switch that has Triton interpret kernels, read when it is imported."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def operators() -> dict[str, str | None]:
    """Operator -> why it has no Triton kernel that could be compiled, or None."""
    return {op: native.missing("triton", op) for op in dict.fromkeys(case.op for case in catalogue.cases())}


def build(architectures: Sequence[str], cache: Path, *, jobs: int = 0) -> list[Compiled]:
    """Compiles every variant of every kernel for the architectures (sm_80, ..., gfx942), in ``jobs`` processes (0: one
    for each core). ``cache`` remembers disassemblies; Triton's own cache remembers the code.

    To be called where Triton is installed.
    """
    there = [op for op, why in operators().items() if why is None]
    with (
        _compiling(),
        ProcessPoolExecutor(
            jobs or os.cpu_count() or 1, get_context("spawn"), initializer=_start, initargs=(there, architectures)
        ) as pool,
    ):
        number, refused = pool.submit(_listed).result()
        some = [range(first, min(first + _AT_ONCE, number)) for first in range(0, number, _AT_ONCE)]
        found = refused + [c for batch in pool.map(_compile, some, [cache] * len(some)) for c in batch]
    return sorted(found, key=lambda c: (c.source, c.name, c.architecture))


def violations(found: Iterable[Compiled]) -> list[Violation]:
    """What needs no budget to be wrong: code that does not compile, that cannot be launched, or that spills on AMD."""
    out = []
    for c in found:
        numbers = tuple(n for n in ARCHITECTURES if f"sm_{n}" == c.architecture)
        if c.failed:
            for_amd = f" for {c.architecture}" if c.architecture and not numbers else ""
            sentence = f"does not compile{for_amd}: {c.failed}"
            out.append(Violation(c.name, c.source, numbers, "compile", sentence, CAUSES["compile"]))
        elif c.kernel is not None:
            for number in (c.kernel.architecture, *c.kernel.runs_also_on):
                held = budget.occupancy_of(c.kernel, number, threads=c.kernel.threads or WARP, dynamic=0)
                if not held.blocks:
                    sentence = f"cannot be launched: not one block fits an SM's {held.limit}"
                    out.append(Violation(c.name, c.source, (number,), "blocks", sentence, budget.CAUSES["blocks"]))
        elif c.amd is not None:
            spilt = c.amd.get("vgpr_spill_count", 0)
            if spilt and c.default:
                sentence = f"{spilt} registers spilt on {c.architecture}"
                out.append(Violation(c.name, c.source, (), "amd", sentence, CAUSES["amd"]))
            if c.amd["shared"] > AMD_SHARED:
                sentence = f"{c.amd['shared']} bytes of shared memory on {c.architecture}, which has {AMD_SHARED}"
                out.append(Violation(c.name, c.source, (), "amd", sentence, CAUSES["amd"]))
    return out
