"""The test that killed each mutant last time, kept in killers.json: the next run asks it first, then all the others.

It saves time and decides nothing. A run rewrites what it has found out; an entry that is stale or missing does no harm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("killers.json")


class Killer(NamedTuple):
    test: str = ""
    checked: bool = False  # by the checking runner


UNKNOWN = Killer()
Killers = dict[str, Killer]  # by str(mutant)


def load() -> Killers:
    if not FILE.exists():
        return {}
    known = json.loads(FILE.read_text())
    return {m: Killer(test, kind == "checked") for kind, killed in known.items() for m, test in killed.items()}


def save(found: Mapping[str, Killer], mutants: Iterable[str]) -> None:
    """Replaces the entries of those ``found``; what is not among ``mutants`` is gone."""
    known = {**load(), **found}
    kept = {m: known[m] for m in sorted(set(mutants) & known.keys()) if known[m].test}
    kinds = {"plain": False, "checked": True}
    text = {kind: {m: k.test for m, k in kept.items() if k.checked == checked} for kind, checked in kinds.items()}
    temporary = FILE.with_suffix(".tmp")
    temporary.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, FILE)
