"""Judges mutants of the CUDA kernels: builds the emulator's two modules in a folder of its own, and again with a
changed source.

A folder of its own, because a build that pip made in isolation remembers a cmake that is gone, and cannot go on.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from tests.mutation.mutants import ROOT, DoesNotCompile, Mutant
from tests.mutation.suite import tests_of

BUILD = ROOT / "build" / "mutation"


def _tool(*command: str | Path) -> str:
    """What a program of the sound build prints; cmake and ninja may be in this environment and not on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "PATH": path})
    if result.returncode:
        raise SystemExit(f"the sound build fails:\n{result.stdout}{result.stderr}")
    return result.stdout


@functools.cache
def configure() -> None:
    import pybind11

    settings = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": BUILD / "modules",
        "FASTGPT_CUDA": "off",
        "FASTGPT_SIMT": "on",
    }
    _tool("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items()))


class Emulator:
    """One of the modules: the sound one, and the commands that make it."""

    def __init__(self, checked: bool) -> None:
        self.checked = checked
        self.module = "_simt_checked" if checked else "_simt"
        self.variable = f"FASTGPT{self.module.upper()}_LIBRARY"  # read by fastgpt/ops/native.py
        configure()
        _tool("ninja", "-C", BUILD, self.module)
        commands = json.loads((BUILD / "compile_commands.json").read_text())
        self.compile = {
            Path(c["file"]).name: [a for a in shlex.split(c["command"]) if Path(a).name != "ccache"]
            for c in commands
            if f"CMakeFiles/{self.module}_kernels.dir/" in c["command"]
        }
        (link,) = [
            line
            for line in _tool("ninja", "-C", BUILD, "-t", "commands", self.module).splitlines()
            if " -shared " in line
        ]
        self.link = shlex.split(link.strip().removeprefix(": && ").removesuffix("&& :"))
        self.sound = {self.variable: str(BUILD / self.link[self.link.index("-o") + 1])}

    def selection(self, mutant: Mutant) -> list[str]:
        if not self.checked:
            return tests_of(mutant, "simt")
        return ["tests/simt/test_kernels_checked.py", "-k", " or ".join(f"test_checked and {op}" for op in mutant.ops)]

    def environment(self, mutant: Mutant, folder: Path) -> dict[str, str]:
        """Where the tests find the module with the mutant in it, which is built now."""
        changed = folder / mutant.file
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(mutant.mutated())
        link, objects = list(self.link), []
        for unit in mutant.units:
            command = list(self.compile[unit])
            output, source = command.index("-o") + 1, command.index("-c") + 1
            link.remove(command[output])
            objects.append(str(folder / f"{self.module}-{unit}.o"))
            command[output] = objects[-1]
            if mutant.file == f"csrc/cuda/{unit}":
                command[source] = str(changed)
            command[1:1] = [f"-I{folder / 'csrc'}", "-w"]  # a changed header is found before the sound one
            self._compiler(command)
        # First, so that functions of a changed header that other units have too are taken from here.
        link[1:1] = objects
        library = folder / f"{self.module}.so"
        link[link.index("-o") + 1] = str(library)
        self._compiler(link)
        return {self.variable: str(library)}

    @staticmethod
    def _compiler(command: list[str]) -> None:
        result = subprocess.run(command, cwd=BUILD, capture_output=True, text=True)
        if result.returncode:
            raise DoesNotCompile(result.stderr)
