"""Judges mutants of the Triton kernels: a copy of the folder kernels/ with a changed source, run without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.mutation.mutants import ROOT, Mutant
from tests.mutation.suite import tests_of


class Triton:
    """One of the two runners (tests/conftest.py): "interpreter", or "sanitizer" where that notices nothing."""

    def __init__(self, checked: bool) -> None:
        self.sound = {"FASTGPT_TRITON_RUNNER": "sanitizer" if checked else "interpreter"}

    def selection(self, mutant: Mutant) -> list[str]:
        return tests_of(mutant, "triton")

    def environment(self, mutant: Mutant, folder: Path) -> dict[str, str]:
        """Where the tests find the kernels with the mutant among them."""
        kernels = folder / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / mutant.file).write_text(mutant.mutated())
        return {**self.sound, "FASTGPT_TRITON_KERNELS": str(kernels)}  # read by fastgpt/ops/native.py
