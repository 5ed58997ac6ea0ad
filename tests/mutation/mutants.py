"""The planted bugs: what mutants/*.toml lists, each checked against the sources as they are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).with_name("mutants")


class DoesNotCompile(Exception):
    pass


@dataclass(frozen=True)
class Mutant:
    name: str
    kind: str
    file: str  # csrc/... or kernels/...
    find: str  # occurs once
    replace: str
    ops: tuple[str, ...]  # whose suites must notice
    units: tuple[str, ...] = ()  # the .cu files to rebuild
    tests: str = ""  # pytest -k: the tests of those suites that judge it, if not all
    checked: bool = False  # only the checking runner can see it reliably: the plain one is not asked
    equivalent: str = ""  # why no test can see it

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    @property
    def triton(self) -> bool:
        return self.file.startswith("kernels/")

    def mutated(self) -> str:
        """The text of the file with the bug in it; raises ValueError where it does not fit the file."""
        text = (ROOT / self.file).read_text()
        if (count := text.count(self.find)) != 1:
            raise ValueError(f"{self}: `find` occurs {count} times in the source; it must occur once")
        if self.find == self.replace:
            raise ValueError(f"{self}: `replace` changes nothing")
        return text.replace(self.find, self.replace)


def load(folder: Path = FOLDER) -> list[Mutant]:
    """All mutants of a folder. Each file of it is about one source, and has what its mutants share at the top."""
    mutants, wrong, names = [], [], set()
    for path in sorted(folder.glob("*.toml")):
        shared: dict[str, Any] = tomllib.loads(path.read_text())
        for entry in shared.pop("mutant"):
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in {**shared, **entry}.items()}
            try:
                mutant = Mutant(**fields)
                mutant.mutated()
                if str(mutant) in names:
                    raise ValueError(f"{mutant}: there are two of this name")
            except (TypeError, ValueError) as error:
                wrong.append(f"{path.name}: {error}")
                continue
            names.add(str(mutant))
            mutants.append(mutant)
    if wrong:
        raise SystemExit("\n".join(wrong))
    return mutants
