"""Holds compiled kernels to a budget: registers, shared memory, blocks per SM, instructions.

CUDA's is csrc/cuda/budget.toml, Triton's kernels/budget.toml.

The file has two parts. Rules, written by hand, say which instructions kernels must have and must not have::

    [[rule]]
    kernels = ["attention_forward_kernel<*"]    # shell patterns of names
    except = ["*<float*"]                       # optional
    on = ["sm_80", "sm_120"]                    # optional: on these architectures only
    required = ["HMMA", "LDGSTS.128"]           # each at least once, on every architecture
    forbidden = ["LDL", "STL"]                  # none of them
    because = "..."                             # what usually breaks the rule

Below them `fastgpt gate --update` writes what it measured, one line a kernel: registers (rounded up to 8, the unit
that the hardware deals out, so the headroom costs nothing), bytes of static and of dynamic shared memory, threads of
the largest block that was launched, and how many such blocks an SM of each architecture holds at least.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastgpt.gpu.code import Kernel
from fastgpt.gpu.occupancy import ARCHITECTURES, Occupancy, occupancy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REGISTER_STEP = 8  # REGISTER_UNIT / WARP: a thread's registers come in eights
MARKER = "# ---- Written by `fastgpt gate --update`; edits below this line are lost. ----\n"
CAUSES = {
    "registers": "more values are live at once: a larger tile or unroll, fewer warps, or a looser __launch_bounds__",
    "shared": "a larger FASTGPT_SHARED array, one for each template argument of a helper, or in Triton more stages",
    "dynamic": "the third argument of Launch::run grew",
    "blocks": "registers, shared memory or threads of a block grew past what lets that many blocks share an SM",
    "stack": "an array indexed by what is not known when unrolled, a pointer to a local variable, or spilt registers",
    "unknown": "a new kernel or instance: run `fastgpt gate --update` and look at what it writes",
    "gone": "the kernel was renamed or removed: run `fastgpt gate --update`",
    "launched": "the emulator names it in another way, or the build is older than the tests",
    "rule": "the kernels were renamed or removed: change the rule",
}

# Of every launch that tests recorded: kernel -> {(threads of the block, bytes of dynamic shared memory)}.
Launches = Mapping[str, set[tuple[int, int]]]


@dataclass(frozen=True)
class Rule:
    """Which instructions some kernels must have, or must not have."""

    kernels: tuple[str, ...]
    excepted: tuple[str, ...]
    required: tuple[str, ...]
    forbidden: tuple[str, ...]
    because: str
    on: tuple[str, ...] = ()  # names of architectures; none: all

    def covers(self, name: str) -> bool:
        return any(fnmatchcase(name, p) for p in self.kernels) and not any(fnmatchcase(name, p) for p in self.excepted)


@dataclass(frozen=True)
class Limits:
    """What one kernel may use; blocks: architecture -> at least so many on an SM."""

    registers: int
    shared: int
    dynamic: int
    threads: int
    blocks: dict[int, int]


@dataclass(frozen=True)
class Budget:
    rules: tuple[Rule, ...]
    kernels: dict[str, Limits]  # by name
    head: str = ""  # the part written by hand, as it stands


@dataclass(frozen=True)
class Violation:
    """A limit that a kernel breaks. ``patterns``: the instructions concerned, where it is about instructions."""

    kernel: str
    source: str
    architectures: tuple[int, ...]
    what: str  # a key of CAUSES, or "instructions"
    sentence: str
    cause: str
    patterns: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        where = ", ".join(ARCHITECTURES[n].name for n in self.architectures)
        return f"{self.kernel}{f' on {where}' if where else ''}: {self.sentence}"


# --- the file ---


def _check_keys(what: str, table: Mapping[str, Any], types: Mapping[str, type], needed: Iterable[str]) -> None:
    for key, value in table.items():
        if key not in types:
            raise ValueError(f"{what}: unknown key {key!r}; allowed are {', '.join(types)}")
        if type(value) is not types[key]:
            raise ValueError(f"{what}: {key} = {value!r} is not of type {types[key].__name__}")
    for key in needed:
        if key not in table:
            raise ValueError(f"{what}: {key} is missing")


def _parse_rule(index: int, table: Mapping[str, Any]) -> Rule:
    what = f"rule {index}"
    lists = ("kernels", "except", "required", "forbidden", "on")
    _check_keys(what, table, {**dict.fromkeys(lists, list), "because": str}, ("kernels", "because"))
    if not table.get("required") and not table.get("forbidden"):
        raise ValueError(f"{what}: it requires nothing and forbids nothing")
    values = {key: tuple(map(str, table.get(key, ()))) for key in lists}
    names = [a.name for a in ARCHITECTURES.values()]
    if unknown := [name for name in values["on"] if name not in names]:
        raise ValueError(f"{what}: on = {unknown[0]!r} is unknown; allowed are {', '.join(names)}")
    because = " ".join(table["because"].split())
    return Rule(values["kernels"], values["except"], values["required"], values["forbidden"], because, values["on"])


def _parse_limits(name: str, table: Mapping[str, Any]) -> Limits:
    numbers = ("registers", "shared", "dynamic", "threads")
    _check_keys(name, table, {**dict.fromkeys(numbers, int), "blocks": dict}, (*numbers, "blocks"))
    allowed = {a.name: a.number for a in ARCHITECTURES.values()}
    _check_keys(f"{name}: blocks", table["blocks"], dict.fromkeys(allowed, int), ())
    return Limits(**{key: table[key] for key in numbers}, blocks={allowed[sm]: n for sm, n in table["blocks"].items()})


def parse(text: str) -> Budget:
    """Reads a budget file.

    Raises:
        ValueError: it is not TOML, or a key or value is not as it should be; the message names it.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error
    if unknown := data.keys() - {"rule", "kernels"}:
        raise ValueError(f"unknown table {min(unknown)!r}; allowed are rule, kernels")
    kernels = {}
    for tables in data.get("kernels", {}).values():
        kernels.update({name: _parse_limits(name, table) for name, table in tables.items()})
    rules = tuple(_parse_rule(i, table) for i, table in enumerate(data.get("rule", ()), 1))
    return Budget(rules, kernels, text.partition(MARKER)[0])


def load(path: Path) -> Budget:
    """``parse`` of a file; errors name it."""
    try:
        return parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_launches(folder: Path) -> dict[str, set[tuple[int, int]]]:
    """What test runs recorded: files of {kernel: [[threads, dynamic shared bytes], ...]}."""
    launches: dict[str, set[tuple[int, int]]] = {}
    for path in sorted(folder.glob("*.json")):
        for name, shapes in json.loads(path.read_text()).items():
            launches.setdefault(name, set()).update((threads, dynamic) for threads, dynamic in shapes)
    return launches


# --- measuring ---


def occupancy_of(kernel: Kernel, architecture: int, *, threads: int, dynamic: int) -> Occupancy:
    """Of a kernel's code on an architecture that runs it."""
    return occupancy(architecture, threads=threads, registers=kernel.registers, shared=kernel.shared + dynamic)


def _by_name(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    grouped: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        grouped.setdefault(kernel.name, []).append(kernel)
    return grouped


def _blocks(kernels: Sequence[Kernel], threads: int, dynamic: int) -> dict[int, int]:
    """The fewest blocks per SM that an architecture holds of any code that it may run."""
    blocks: dict[int, int] = {}
    for kernel in kernels:
        for number in (kernel.architecture, *kernel.runs_also_on):
            found = occupancy_of(kernel, number, threads=threads, dynamic=dynamic).blocks
            blocks[number] = min(found, blocks.get(number, found))
    return dict(sorted(blocks.items()))


def _launch(kernels: Sequence[Kernel], launches: Launches, known: Limits | None) -> tuple[int, int]:
    """(threads, dynamic shared bytes): the most that was launched; else what the budget knew; else the launch bound."""
    name = kernels[0].name
    if shapes := launches.get(name):
        return max(threads for threads, _ in shapes), max(dynamic for _, dynamic in shapes)
    if known is not None:
        return known.threads, known.dynamic
    return kernels[0].threads or 1024, 0


def measure(kernels: Iterable[Kernel], launches: Launches, known: Budget) -> dict[str, dict[str, Limits]]:
    """What the kernels use, as limits: source -> name -> limits."""
    measured: dict[str, dict[str, Limits]] = {}
    for name, versions in sorted(_by_name(kernels).items()):
        threads, dynamic = _launch(versions, launches, known.kernels.get(name))
        measured.setdefault(versions[0].source, {})[name] = Limits(
            registers=min(-(-max(k.registers for k in versions) // REGISTER_STEP) * REGISTER_STEP, 255),
            shared=max(k.shared for k in versions),
            dynamic=dynamic,
            threads=threads,
            blocks=_blocks(versions, threads, dynamic),
        )
    return dict(sorted(measured.items()))


def render(head: str, measured: Mapping[str, Mapping[str, Limits]]) -> str:
    """The budget file: the part written by hand, then the measured limits."""
    lines = [head.rstrip("\n"), "", MARKER.rstrip("\n")]
    for source, kernels in measured.items():
        lines += ["", f"[kernels.{source}]" if source.isidentifier() else f'[kernels."{source}"]']
        for name, limits in kernels.items():
            blocks = ", ".join(f"{ARCHITECTURES[number].name} = {n}" for number, n in limits.blocks.items())
            lines.append(
                f'"{name}" = {{ registers = {limits.registers}, shared = {limits.shared}, dynamic = {limits.dynamic}, '
                f"threads = {limits.threads}, blocks = {{ {blocks} }} }}"
            )
    return "\n".join(lines) + "\n"


# --- checking ---


def _violations_of(name: str, kernels: Sequence[Kernel], limits: Limits, launches: Launches) -> Iterable[Violation]:
    source = kernels[0].source

    def violation(what: str, architectures: Sequence[int], sentence: str) -> Violation:
        return Violation(name, source, tuple(architectures), what, sentence, CAUSES[what])

    for what, unit in (("registers", "registers"), ("shared", "bytes of shared memory")):
        most = getattr(limits, what)
        over = [k for k in kernels if getattr(k, what) > most]
        if over:
            found = max(getattr(k, what) for k in over)
            yield violation(what, [k.architecture for k in over], f"{found} {unit}, {most} allowed")
    if stacked := [k for k in kernels if k.stack]:
        found = max(k.stack for k in stacked)
        yield violation(
            "stack", [k.architecture for k in stacked], f"{found} bytes of local memory a thread, 0 allowed"
        )
    dynamic = max((dynamic for _, dynamic in launches.get(name, ())), default=0)
    if dynamic > limits.dynamic:
        sentence = f"launched with {dynamic} bytes of dynamic shared memory, {limits.dynamic} allowed"
        yield violation("dynamic", (), sentence)
    for number, found in _blocks(kernels, limits.threads, max(dynamic, limits.dynamic)).items():
        if found < limits.blocks.get(number, 1):
            yield violation(
                "blocks", [number], f"{found} blocks per SM, at least {limits.blocks.get(number, 1)} wanted"
            )


def _violations_of_rule(rule: Rule, kernels: Mapping[str, Sequence[Kernel]]) -> Iterable[Violation]:
    covered = [name for name in kernels if rule.covers(name)]
    meant = {
        name: [k for k in kernels[name] if not rule.on or ARCHITECTURES[k.architecture].name in rule.on]
        for name in covered
    }
    if not covered:
        yield Violation(" ".join(rule.kernels), "", (), "rule", "a rule for kernels that do not exist", CAUSES["rule"])
    for name in covered:
        for pattern in rule.required:
            if without := [k for k in meant[name] if not k.count(pattern)]:
                yield Violation(
                    name,
                    without[0].source,
                    tuple(k.architecture for k in without),
                    "instructions",
                    f"no {pattern}, which it must have",
                    rule.because,
                )
        for pattern in rule.forbidden:
            if having := [k for k in meant[name] if k.count(pattern)]:
                yield Violation(
                    name,
                    having[0].source,
                    tuple(k.architecture for k in having),
                    "instructions",
                    f"{max(k.count(pattern) for k in having)} x {pattern}, which it must not have",
                    rule.because,
                    (pattern,),
                )


def check(kernels: Iterable[Kernel], budget: Budget, launches: Launches) -> list[Violation]:
    """Every limit that is broken. An empty list: all kernels are within the budget."""
    grouped = _by_name(kernels)
    found: list[Violation] = []
    for name, versions in grouped.items():
        if name in budget.kernels:
            found += _violations_of(name, versions, budget.kernels[name], launches)
        else:
            found.append(
                Violation(name, versions[0].source, (), "unknown", "is not in the budget file", CAUSES["unknown"])
            )
    for name in budget.kernels.keys() - grouped.keys():
        found.append(Violation(name, "", (), "gone", "is in the budget file, but not in the build", CAUSES["gone"]))
    for name in launches.keys() - grouped.keys():
        found.append(
            Violation(
                name, "", (), "launched", "was launched on the emulator, but is not in the build", CAUSES["launched"]
            )
        )
    for rule in budget.rules:
        found += _violations_of_rule(rule, grouped)
    return sorted(found, key=lambda v: (v.source, v.kernel, v.what, v.sentence))
