"""``fastgpt gate``: holds the compiled CUDA kernels to their budget."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import typer

from fastgpt.cli.errors import plain_errors
from fastgpt.cli.explain import BUDGET, compiled_kernels
from fastgpt.files import atomic_write
from fastgpt.gpu import budget, code, diagnosis
from fastgpt.gpu.occupancy import ARCHITECTURES

LAUNCHES = code.ROOT / "build" / "launches"
# Not shipped, but a build may be narrowed to them: the PTX is assembled for them.
ALSO = (86, 89)


def gate(
    update: Annotated[
        bool, typer.Option("--update", help="Write what the kernels use now into the budget file.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(help="Show the source lines behind the violations of kernels that fit this.", metavar="PATTERN"),
    ] = None,
) -> None:
    """Check every compiled CUDA kernel against csrc/cuda/budget.toml; end with status 1 if one breaks a limit.

    It reads the code that was built for sm_80, 90, 100 and 120, and assembles its PTX for sm_86 and sm_89. Shapes of
    launches come from the last test run on the emulator, where there was one.
    """
    with plain_errors():
        if not BUDGET.exists():
            raise ValueError("the kernels' budget lies in a source checkout of fastgpt; this is an installed copy")
        kernels = compiled_kernels(ALSO)
        limits, launches = budget.load(BUDGET), budget.load_launches(LAUNCHES)
        if update:
            measured = budget.measure(kernels, launches, limits)
            text = budget.render(limits.head, measured)
            before, limits = limits, budget.parse(text)
            with atomic_write(BUDGET) as file:
                file.write(text)
            changed = sum(before.kernels.get(name) != new for name, new in limits.kernels.items())
            gone = len(before.kernels.keys() - limits.kernels.keys())
            print(f"wrote {BUDGET.relative_to(code.ROOT)}: {changed} kernels new or changed, {gone} gone")
        violations = budget.check(kernels, limits, launches)
        if explain is not None:
            _explain(violations, explain, kernels)
        else:
            for violation in violations:
                print(violation)
        architectures = ", ".join(ARCHITECTURES[n].name for n in sorted({k.architecture for k in kernels}))
        names = {k.name for k in kernels}
        if violations:
            print(f"\n{len(violations)} violations in {len(names)} kernels on {architectures}.")
            if explain is None:
                print("`fastgpt gate --explain PATTERN` shows the source lines behind those of some kernels.")
            raise typer.Exit(1)
        print(f"{len(names)} kernels on {architectures}: all within {BUDGET.relative_to(code.ROOT)}.")


def _explain(violations: list[budget.Violation], pattern: str, kernels: list[code.Kernel]) -> None:
    if not any(fnmatchcase(k.name, pattern) for k in kernels):
        raise ValueError(f"--explain {pattern!r}: no kernel of this build fits it")
    chosen = [v for v in violations if fnmatchcase(v.kernel, pattern)]
    for violation in chosen:
        for line in diagnosis.explain(violation):
            print(line)
        print()
    if not chosen:
        print(f"No kernel that fits {pattern!r} breaks its budget.")
