"""Builds the native core with CMake. All other metadata is in pyproject.toml.

Environment: FASTGPT_CUDA=auto|on|off (compile the CUDA side where nvcc is found; insist; leave it out),
FASTGPT_CUDA_ARCHS="80-real;90-real" (narrow the CUDA architectures), CMAKE_BUILD_PARALLEL_LEVEL.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
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


setup(ext_modules=[Extension("fastgpt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
