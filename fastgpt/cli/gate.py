"""``fastgpt gate``: holds the compiled CUDA and Triton kernels to their budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from fastgpt.cli.errors import plain_errors
from fastgpt.cli.explain import BUDGETS, Kind, compiled_kernels, compiled_triton
from fastgpt.files import atomic_write
from fastgpt.gpu import budget, code, diagnosis, triton_build
from fastgpt.gpu.occupancy import ARCHITECTURES

LAUNCHES = code.ROOT / "build" / "launches"
# Not shipped, but a build may be narrowed to them: the PTX is assembled for them.
ALSO = (86, 89)


@dataclass(frozen=True)
class Subject:
    """What is held to one budget file. ``broken``: what is wrong whatever the budget says. ``remark``: what the report
    says beside it."""

    kernels: list[code.Kernel]
    file: Path
    launches: budget.Launches
    broken: list[budget.Violation] = field(default_factory=list)
    cubins: Mapping[tuple[str, int], Path] | None = None
    remark: str = ""


def _cuda() -> Subject:
    return Subject(compiled_kernels(ALSO), BUDGETS[Kind.cuda], budget.load_launches(LAUNCHES))


def _triton() -> Subject:
    found = compiled_triton([*(a.name for a in ARCHITECTURES.values()), triton_build.AMD])
    kernels = [c.kernel for c in found if c.kernel is not None]
    amd = [c for c in found if c.amd is not None]
    lacking = sorted(op for op, why in triton_build.operators().items() if why is not None)
    remark = f"{len(amd)} kernels on {triton_build.AMD}: compiled, not run."
    if lacking:
        remark += f"\nNo Triton kernel: {', '.join(lacking)}."
    return Subject(
        kernels,
        BUDGETS[Kind.triton],
        {k.name: {(k.threads or 1, 0)} for k in kernels},
        triton_build.violations(found),
        {(c.kernel.name, c.kernel.architecture): c.cubin for c in found if c.kernel is not None and c.cubin},
        remark,
    )


def _hold(subject: Subject, update: bool, explain: str | None) -> int:
    """Prints what breaks the budget, and returns how much does."""
    limits = budget.load(subject.file)
    if update:
        measured = budget.measure(subject.kernels, subject.launches, limits)
        text = budget.render(limits.head, measured)
        before, limits = limits, budget.parse(text)
        with atomic_write(subject.file) as file:
            file.write(text)
        changed = sum(before.kernels.get(name) != new for name, new in limits.kernels.items())
        gone = len(before.kernels.keys() - limits.kernels.keys())
        print(f"wrote {subject.file.relative_to(code.ROOT)}: {changed} kernels new or changed, {gone} gone")
    violations = subject.broken + budget.check(subject.kernels, limits, subject.launches)
    if explain is not None:
        _explain([v for v in violations if fnmatchcase(v.kernel, explain)], subject)
    else:
        for violation in violations:
            print(violation)
    architectures = ", ".join(ARCHITECTURES[n].name for n in sorted({k.architecture for k in subject.kernels}))
    where = f"{len({k.name for k in subject.kernels})} kernels on {architectures}"
    if violations:
        print(f"\n{len(violations)} violations in {where}.")
    else:
        print(f"{where}: all within {subject.file.relative_to(code.ROOT)}.")
    if subject.remark:
        print(subject.remark)
    return len(violations)


def _explain(violations: list[budget.Violation], subject: Subject) -> None:
    for violation in violations:
        for line in diagnosis.explain(violation, subject.cubins):
            print(line)
        print()


def gate(
    update: Annotated[
        bool, typer.Option("--update", help="Write what the kernels use now into the budget files.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(help="Show the source lines behind the violations of kernels that fit this.", metavar="PATTERN"),
    ] = None,
    only: Annotated[Kind | None, typer.Option(help="Only these kernels.")] = None,
) -> None:
    """Check every compiled kernel against its budget; end with status 1 if one breaks a limit.

    CUDA (csrc/cuda/budget.toml): the code that was built for sm_80, 90, 100 and 120, and its PTX assembled for sm_86
    and sm_89. Shapes of launches come from the last test run on the emulator, where there was one.

    Triton (kernels/budget.toml): every kernel and configuration, compiled now for each of them, and for AMD's gfx942.
    """
    with plain_errors():
        if not all(path.exists() for path in BUDGETS.values()):
            raise ValueError("the kernels' budgets lie in a source checkout of fastgpt; this is an installed copy")
        subjects = [make() for kind, make in ((Kind.cuda, _cuda), (Kind.triton, _triton)) if only in (None, kind)]
        if explain is not None and not any(fnmatchcase(k.name, explain) for s in subjects for k in s.kernels):
            raise ValueError(f"--explain {explain!r}: no kernel of this build fits it")
        found = sum(_hold(subject, update, explain) for subject in subjects)
        if found and explain is None:
            print("`fastgpt gate --explain PATTERN` shows the source lines behind the violations of some kernels.")
        if found:
            raise typer.Exit(1)
