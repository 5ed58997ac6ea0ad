"""``make mutate``: plants known bugs in the CUDA and Triton kernels, one at a time; the tests must notice each.

mutants/*.toml list them: a piece of source and what to put in its place. A mutant is killed when a test of its
operators fails: on the emulator or, if the plain one notices nothing, on the checked one; for Triton by the interpreter
or else the sanitizer. Mutants that change nothing that a program can observe are marked ``equivalent`` with the reason;
they must survive. The run fails if another one does, if one does not compile, or if a test that killed one fails on
sound kernels too. What killed each last time is asked first (killers.py).

The sound emulator is built in build/mutation. Then only the changed file is compiled, with the same commands, into a
folder of its own: neither the sources nor that build are touched.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutation import killers, suite
from tests.mutation.emulator import Emulator
from tests.mutation.killers import UNKNOWN, Killer
from tests.mutation.mutants import DoesNotCompile, Mutant, load
from tests.mutation.triton_kernels import Triton


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    killer: str = ""  # the test that failed
    why: str = ""  # how it failed, or what was wrong with the mutant
    broken: bool = False  # it does not compile, so it says nothing
    seconds: float = 0.0
    runner: str = ""  # by which it failed

    @property
    def good(self) -> bool:
        return not self.broken and bool(self.killer) == (not self.mutant.equivalent)

    def __str__(self) -> str:
        if self.broken:
            return f"DOES NOT COMPILE  {self.mutant}\n{self.why}"
        if self.mutant.equivalent:
            return f"NOT EQUIVALENT  {self.mutant}: {self.killer}" if self.killer else f"equivalent  {self.mutant}"
        return f"killed    {self.mutant}: {self.killer}" if self.killer else f"SURVIVED  {self.mutant}"


# "<language> <checked>": what judges the mutants of a language, the plain runner and the checking one.
Runners = dict[str, "Emulator | Triton"]


def make_runners(mutants: Sequence[Mutant]) -> Runners:
    runners: Runners = {}
    for checked in (False, True):
        if any(m.triton for m in mutants):
            runners[f"triton {checked}"] = Triton(checked)
        if not all(m.triton for m in mutants):
            runners[f"cuda {checked}"] = Emulator(checked)
    return runners


def judge(mutant: Mutant, runners: Runners, last: Killer = UNKNOWN) -> Outcome:
    """``last``: what killed it in the last run, which is asked first."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastgpt-mutant-") as folder:
        for checked in (True,) if mutant.checked else (last.checked, not last.checked):
            name = f"{'triton' if mutant.triton else 'cuda'} {checked}"
            try:
                environment = runners[name].environment(mutant, Path(folder))
            except DoesNotCompile as error:
                return Outcome(mutant, why=str(error), broken=True)
            result = suite.run(runners[name].selection(mutant), environment, last.test)
            if result.failed:
                return Outcome(mutant, result.failed, result.why, seconds=time.monotonic() - began, runner=name)
    return Outcome(mutant, seconds=time.monotonic() - began)


def verdict(outcomes: Sequence[Outcome]) -> tuple[str, bool]:
    """What to print at the end, and whether the run is good."""
    real = [o for o in outcomes if not o.mutant.equivalent]
    killed = [o for o in real if o.killer]
    lines = [f"killed {len(killed)} of {len(real)} mutants ({100 * len(killed) / max(1, len(real)):.1f} %)"]
    lines += [f"{o}: {o.mutant.equivalent}" for o in outcomes if o.mutant.equivalent and o.good]
    lines += [str(o) for o in outcomes if not o.good]
    return "\n".join(lines), all(o.good for o in outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n\n")[0])
    parser.add_argument("-k", metavar="TEXT", default="", help="only mutants with TEXT in their file, name or kind")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("-v", "--verbose", action="store_true", help="print how each killing test failed")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    all_mutants = load()
    mutants = [m for m in all_mutants if options.k in f"{m}: {m.kind}"]
    if not mutants:
        parser.error(f"no mutant has {options.k!r} in its file, name or kind")
    if options.list:
        for m in mutants:
            print(f"{m.kind:10} {m}{'  (equivalent)' if m.equivalent else ''}")
        return 0
    began = time.monotonic()
    runners, known = make_runners(mutants), killers.load()
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        judged = [pool.submit(judge, m, runners, known.get(str(m), UNKNOWN)) for m in mutants]
        for done in concurrent.futures.as_completed(judged):
            outcomes.append(done.result())
            print(f"{outcomes[-1]} ({outcomes[-1].seconds:.0f} s)", flush=True)
            if options.verbose and outcomes[-1].killer:
                print("\n".join(outcomes[-1].why.splitlines()[-15:]), flush=True)
    found = {str(o.mutant): Killer(o.killer, o.runner.endswith("True")) for o in outcomes}
    killers.save(found, map(str, all_mutants))
    text, good = verdict(outcomes)
    print(f"\n{text}")
    # A kill means something only if the test passes without the bug.
    for name, runner in runners.items() if good else ():
        tests = sorted({o.killer for o in outcomes if o.runner == name})
        sound = suite.run(tests, runner.sound) if tests else suite.Result(0)
        good = good and not sound.failed
        if sound.failed:
            print(f"FAILS ON SOUND KERNELS  {sound.failed}\n{sound.why}")
        elif tests:
            print(f"the {sound.ran} tests that killed them pass on sound kernels ({name.split()[0]})")
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
