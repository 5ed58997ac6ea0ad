"""Finds NVIDIA's programs: nvcc and ptxas of a CUDA toolkit, cuobjdump and nvdisasm of one or of Triton's wheel."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_HINTS = {
    "nvcc": "install the CUDA toolkit, or set CUDA_HOME to it",
    "ptxas": "install the CUDA toolkit, or Triton's wheel (pip install triton)",
    "cuobjdump": "install the CUDA toolkit, or Triton's wheel (pip install triton)",
    "nvdisasm": "install the CUDA toolkit, or Triton's wheel (pip install triton)",
}


class ToolMissingError(FileNotFoundError):
    """A program that is needed is not on this machine; the message says which, and where it comes from."""


def _folders() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield Path(root) / "bin"
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parent
    yield Path("/usr/local/cuda/bin")
    spec = importlib.util.find_spec("triton")  # does not import it
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "backends" / "nvidia" / "bin"


@functools.cache
def find(name: str) -> Path:
    """The program ``name``: from PATH, CUDA_HOME, nvcc's folder, /usr/local/cuda, or Triton's wheel.

    Raises:
        ToolMissingError: it is nowhere there.
    """
    if found := shutil.which(name):
        return Path(found)
    for folder in _folders():
        if (folder / name).is_file() and os.access(folder / name, os.X_OK):
            return folder / name
    raise ToolMissingError(f"{name} was not found on PATH, in CUDA_HOME, /usr/local/cuda or Triton: {_HINTS[name]}")


def missing(*names: str) -> str | None:
    """Why one of the programs cannot be used, or None if all are there."""
    for name in names:
        try:
            find(name)
        except ToolMissingError as error:
            return str(error)
    return None


def run(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What the program prints on stdout.

    Raises:
        ToolMissingError: it is not on this machine.
        ValueError: it failed; the message is what it printed.
    """
    done = subprocess.run([find(name), *map(str, arguments)], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        raise ValueError(f"{name} failed:\n{(done.stderr + done.stdout).strip()}")
    return done.stdout


@functools.cache
def version(name: str) -> str:
    """The program's own line about its version."""
    lines = run(name, "--version").strip().splitlines()
    return lines[-1]
