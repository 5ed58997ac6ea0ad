"""Compiles small test kernels with the emulator, without fastgpt: what another project would do to use csrc/simt."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
RUNTIME = ("fiber.cpp", "runtime.cpp")
# As csrc/simt/CMakeLists.txt compiles kernels for the checked build.
CHECKED_KERNEL = [
    "-O1",
    "-g1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-fno-store-merging",
]


def library(source: Path, checked: bool) -> ctypes.CDLL:
    """``source``, a file of kernels and ``extern "C"`` functions that launch them, as a loaded library.

    Built once for each content under build/; several test processes may ask at the same time.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH: the emulator's own tests compile kernels with it")
    digest = hashlib.sha256()
    headers = source.parent.glob("*.h"), (CSRC / "simt").glob("*"), (CSRC / "cuda/core").glob("*")
    for path in (source, Path(__file__), *(path for folder in headers for path in sorted(folder))):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "simt-tests"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}{'-checked' if checked else ''}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        defines = ["-DSIMT_CHECKED"] if checked else []
        common = [compiler, "-std=gnu++17", "-fPIC", f"-I{CSRC}", "-DFASTGPT_ISA=emulated", "-Wno-unknown-pragmas"]
        scratch = folder / f"{target.stem}-{os.getpid()}"
        kernels = scratch.with_suffix(".o")
        subprocess.run(
            [*common, *defines, *(CHECKED_KERNEL if checked else ["-O1"]), "-x", "c++", "-c", source, "-o", kernels],
            check=True,
        )
        runtime = [CSRC / "simt" / name for name in (*RUNTIME, *(["check.cpp"] if checked else []))]
        unfinished = scratch.with_suffix(".so")
        subprocess.run([*common, *defines, "-O1", "-g1", "-shared", *runtime, kernels, "-o", unfinished], check=True)
        kernels.unlink()
        unfinished.rename(target)  # whoever comes first, the content is the same
    return ctypes.CDLL(str(target))
