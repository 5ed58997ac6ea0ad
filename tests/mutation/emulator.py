"""How the build compiles and links the emulator's two modules, and how to do the same with a changed source."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tests.mutation.mutants import ROOT, Mutant

BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


class DoesNotCompile(Exception):
    pass


class Emulator:
    """One of the modules: the sound one, `library`, and the commands that make it, taken from the build folder."""

    def __init__(self, checked: bool) -> None:
        self.module = "_simt_checked" if checked else "_simt"
        if not (BUILD / "compile_commands.json").exists():
            raise SystemExit(f"there is no build in {BUILD}: build with FASTGPT_SIMT=on")
        self._ninja(self.module)  # so that all else is up to date
        commands = json.loads((BUILD / "compile_commands.json").read_text())
        self.compile = {
            Path(c["file"]).name: [a for a in shlex.split(c["command"]) if Path(a).name != "ccache"]
            for c in commands
            if f"CMakeFiles/{self.module}_kernels.dir/" in c["command"]
        }
        (link,) = [line for line in self._ninja("-t", "commands", self.module).splitlines() if " -shared " in line]
        self.link = shlex.split(link.strip().removeprefix(": && ").removesuffix("&& :"))
        self.library = Path(self.link[self.link.index("-o") + 1])

    @staticmethod
    def _ninja(*arguments: str) -> str:
        result = subprocess.run(["ninja", "-C", BUILD, *arguments], text=True, capture_output=True)
        if result.returncode:
            raise SystemExit(f"the sound build fails:\n{result.stdout}{result.stderr}")
        return result.stdout

    def build(self, mutant: Mutant, folder: Path) -> Path:
        """The module with the mutant in it."""
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
            if mutant.file == f"cuda/{unit}":
                command[source] = str(changed)
            command[1:1] = [f"-I{folder}", "-w"]  # a changed header is found before the sound one
            self._compiler(command)
        # First, so that functions of a changed header that other units have too are taken from here.
        link[1:1] = objects
        library = folder / f"{self.module}.so"
        link[link.index("-o") + 1] = str(library)
        self._compiler(link)
        return library

    @staticmethod
    def _compiler(command: list[str]) -> None:
        result = subprocess.run(command, cwd=BUILD, capture_output=True, text=True)
        if result.returncode:
            raise DoesNotCompile(result.stderr)
