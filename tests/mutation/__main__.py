"""``make mutate``: plants known bugs in the CUDA kernels, one at a time, and checks that the test suite notices each.

mutants.toml lists them: a piece of source and what to put in its place. A mutant is killed when a test of its operators
fails on the emulator; if the plain suite passes, the checked build gets its turn. Mutants that change nothing that a
program can observe are marked `equivalent` with the reason; they must survive. The run fails if another one does.

Needs a build with FASTGPT_SIMT=on (`make` does that). Each mutant is compiled with the emulator's own commands, taken
from the build folder, into a folder of its own: neither the sources nor the build are touched.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
KERNELS = Path("csrc/cuda")
TIMEOUT = 300  # seconds for one suite: a mutant may loop for ever, and is then noticed too


@dataclass
class Mutant:
    name: str
    kind: str
    file: str  # under csrc/cuda
    find: str  # occurs once
    replace: str
    ops: list[str]  # whose kernels are rebuilt and whose suites must notice
    units: list[str] = field(default_factory=list)  # the .cu files to rebuild; <op>.cu of `ops` if empty
    checked_first: bool = False  # a mutant that only the checked build can see reliably
    equivalent: str = ""  # why no test can see it

    def __post_init__(self) -> None:
        if not self.units:
            self.units = [f"{op}.cu" for op in self.ops]


@dataclass
class Outcome:
    mutant: Mutant
    killed_by: str  # "" if it survived
    seconds: float


def load(path: Path) -> list[Mutant]:
    """The mutants of a file, each checked to fit the sources as they are."""
    mutants = [Mutant(**entry) for entry in tomllib.loads(path.read_text())["mutant"]]
    names = [m.name for m in mutants]
    if twice := {n for n in names if names.count(n) > 1}:
        raise SystemExit(f"{path.name}: two mutants are named {sorted(twice)}")
    for m in mutants:
        count = (ROOT / KERNELS / m.file).read_text().count(m.find)
        if count != 1:
            raise SystemExit(f"{path.name}: {m.name!r}: `find` occurs {count} times in {m.file}; it must occur once")
        if m.find == m.replace:
            raise SystemExit(f"{path.name}: {m.name!r} changes nothing")
    return mutants


class Emulator:
    """How the build compiles and links one emulator module, and how to do the same with some sources changed."""

    def __init__(self, module: str) -> None:
        self.module = module
        commands = json.loads((BUILD / "compile_commands.json").read_text())
        marker = f"CMakeFiles/{module}_kernels.dir/"
        self.compile = {
            Path(c["file"]).name: [a for a in shlex.split(c["command"]) if Path(a).name != "ccache"]
            for c in commands
            if marker in c["command"]
        }
        listed = subprocess.run(
            ["ninja", "-C", BUILD, "-t", "commands", f"{module}"], text=True, capture_output=True, check=True
        )
        (link,) = [line for line in listed.stdout.splitlines() if f"{module}.cpython" in line and " -shared" in line]
        self.link = [a for a in shlex.split(link) if a not in (":", "&&")]

    def build(self, sources: Path, units: list[str], folder: Path) -> Path:
        """The module with ``units`` compiled from the csrc folder ``sources``; raises CalledProcessError."""
        link = list(self.link)
        for unit in units:
            command = list(self.compile[unit])
            object_at = command.index("-o") + 1
            old = command[object_at]
            command[object_at] = str(folder / f"{self.module}-{unit}.o")
            command[command.index("-c") + 1] = str(sources / "cuda" / unit)
            # The changed csrc comes first on the include path.
            command[1:1] = [f"-I{sources}", "-w"]
            subprocess.run(command, cwd=BUILD, check=True, capture_output=True, text=True)
            link = [command[object_at] if a == old or a.endswith(f"/{old}") else a for a in link]
        target = folder / f"{self.module}.so"
        link[link.index("-o") + 1] = str(target)
        subprocess.run(link, cwd=BUILD, check=True, capture_output=True, text=True)
        return target


def suite(checked: bool, ops: list[str]) -> list[str]:
    """The tests that judge a mutant."""
    if checked:
        return ["tests/simt/test_kernels_checked.py", "-k", " or ".join(ops)]
    files = [str(p.relative_to(ROOT)) for op in ops for p in sorted((ROOT / "tests/ops").glob(f"test_{op}*.py"))]
    return [*files, "-k", "simt"]


def run_suite(arguments: list[str], library: Path | None, checked: bool) -> str:
    """The first test that fails with this emulator, "" if none does."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if library is not None:
        environment["FASTGPT_SIMT_CHECKED_LIBRARY" if checked else "FASTGPT_SIMT_LIBRARY"] = str(library)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    command += ["-m", "not slow and not gpu", "--benchmark-disable", *arguments]
    try:
        result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return "timeout"
    if result.returncode == 0:
        return ""
    if result.returncode == 1:
        for line in result.stdout.splitlines():
            if line.startswith("FAILED "):
                return line.split()[1].removeprefix("tests/")
        return "a test failed"
    if result.returncode < 0:
        return f"signal {-result.returncode}"
    raise SystemExit(f"pytest itself failed ({result.returncode}) on {arguments}:\n{result.stdout}\n{result.stderr}")


def judge(mutant: Mutant, emulators: dict[bool, Emulator]) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastgpt-mutant-") as name:
        folder = Path(name)
        sources = folder / "csrc"
        shutil.copytree(ROOT / "csrc", sources)
        target = sources / "cuda" / mutant.file
        target.write_text(target.read_text().replace(mutant.find, mutant.replace))
        for checked in (True, False) if mutant.checked_first else (False, True):
            try:
                library = emulators[checked].build(sources, mutant.units, folder)
            except subprocess.CalledProcessError as error:
                raise SystemExit(f"{mutant.name!r} does not compile:\n{error.stderr}") from None
            if killer := run_suite(suite(checked, mutant.ops), library, checked):
                return Outcome(mutant, f"{'checked: ' if checked else ''}{killer}", time.monotonic() - began)
    return Outcome(mutant, "", time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only mutants with TEXT in their name, file or kind")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    mutants = load(Path(__file__).with_name("mutants.toml"))
    mutants = [m for m in mutants if options.k in f"{m.name} {m.file} {m.kind}"]
    if not mutants:
        raise SystemExit(f"no mutant matches -k {options.k!r}")
    if options.list:
        for m in mutants:
            print(f"{m.file:28} {m.kind:12} {m.name}{'  (equivalent)' if m.equivalent else ''}")
        return 0
    emulators = {False: Emulator("_simt"), True: Emulator("_simt_checked")}
    console = Console()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        suites = sorted({(checked, tuple(m.ops)) for m in mutants for checked in (False, True)})
        console.print(f"{len(mutants)} mutants; first the suites on sound kernels, without which a kill means nothing")
        for (checked, ops), failed in zip(
            suites, pool.map(lambda s: run_suite(suite(s[0], list(s[1])), None, s[0]), suites), strict=True
        ):
            if failed:
                raise SystemExit(
                    f"the {'checked ' if checked else ''}suite of {', '.join(ops)} fails unmutated: {failed}"
                )
        outcomes = []
        columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(mutants))
            for done in concurrent.futures.as_completed(pool.submit(judge, m, emulators) for m in mutants):
                outcome = done.result()
                outcomes.append(outcome)
                progress.advance(bar)
                verdict = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVED"
                print(f"{outcome.mutant.file}: {outcome.mutant.name}: {verdict} ({outcome.seconds:.0f} s)", flush=True)

    real = [o for o in outcomes if not o.mutant.equivalent]
    survivors = [o for o in real if not o.killed_by]
    refuted = [o for o in outcomes if o.mutant.equivalent and o.killed_by]
    print(
        f"\nkilled {len(real) - len(survivors)} of {len(real)} mutants"
        f" ({100 * (len(real) - len(survivors)) / max(1, len(real)):.0f} %)"
    )
    for o in outcomes:
        if o.mutant.equivalent and not o.killed_by:
            print(f"equivalent: {o.mutant.file}: {o.mutant.name}: {o.mutant.equivalent}")
    for o in survivors:
        print(f"SURVIVED: {o.mutant.file}: {o.mutant.name}")
    for o in refuted:
        print(f"NOT EQUIVALENT: {o.mutant.file}: {o.mutant.name}: killed by {o.killed_by}")
    return 1 if survivors or refuted else 0


if __name__ == "__main__":
    sys.exit(main())
