"""Builds the native core with CMake. All other metadata is in pyproject.toml.

Environment: FASTGPT_CUDA=auto|on|off (compile the CUDA side where nvcc is found; insist; leave it out),
FASTGPT_CUDA_ARCHS="80-real;90-real" (narrow the CUDA architectures), FASTGPT_SIMT=on (also build the CUDA kernels for
the emulator, which the tests use), CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SIMT = os.environ.get("FASTGPT_SIMT", "off").lower() == "on"


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts the modules where setuptools expects them."""

    def build_extension(self, ext: Extension) -> None:
        if ext is not self.extensions[0]:
            return  # CMake builds all of them at once
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cuda = os.environ.get("FASTGPT_CUDA", "auto").lower()
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output.parent}",
            f"-DFASTGPT_CUDA={cuda}",
            f"-DFASTGPT_SIMT={'on' if SIMT else 'off'}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if archs := os.environ.get("FASTGPT_CUDA_ARCHS"):
            configure.append(f"-DFASTGPT_CUDA_ARCHS={archs}")
        build.mkdir(parents=True, exist_ok=True)
        # --fresh: a build isolated by pip has its tools in a new temporary folder each time, and a cache that remembers
        # the old paths fails. Objects that are up to date are kept all the same.
        configured = subprocess.run([*configure, "--fresh"], text=True, capture_output=True)
        sys.stdout.write(configured.stdout)
        if configured.returncode:
            sys.exit(f"{configured.stderr}\nfastgpt: configuring the native core failed (see above)")
        for line in configured.stdout.splitlines():
            if line.startswith("-- fastgpt: "):
                print(line[3:], flush=True)
        if subprocess.run(["cmake", "--build", build]).returncode:
            sys.exit("fastgpt: compiling the native core failed (see above)")


MODULES = ["fastgpt._C", *(["fastgpt._simt", "fastgpt._simt_checked"] if SIMT else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
