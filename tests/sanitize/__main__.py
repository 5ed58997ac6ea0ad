"""``make sanitize``: the operators' tests on a native core under AddressSanitizer and UndefinedBehaviorSanitizer, then
under ThreadSanitizer on the core's own loop.

Each build lies in build/sanitize-<kind>: the normal one is not touched. Before the tests, bugs planted in the build
(planted.cpp) show that the sanitizer sees what it is there for. docs/sanitizers.md
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# avx512 is avx512_bf16 without its products. The loops, and what their pieces share, are the same on every level, and
# g++'s ThreadSanitizer sees no vectors of more than 16 bytes: so baseline alone.
LEVELS = {"address": "baseline;avx2;avx512_bf16", "thread": "baseline"}
# The first must come first among a process's libraries. libstdc++: Python does not have it, and the sanitizers look up
# its __cxa_throw when they start.
RUNTIMES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
# Python's and torch's own leaks are not ours to find; a report ends the process.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    },
    # Of torch and Python, which are not instrumented, ThreadSanitizer would see their calls of libc alone.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:die_after_fork=0"},
}
# By name: tests that run no kernel of the core, or run long for what a sanitizer does not judge (distributions), or
# through layers of torch that add nothing to the kernels' accesses.
LEFT_OUT = (
    *("simt", "triton", "reference", "torch", "cuda", "schedule", "transformers", "hugging_face"),
    *("registration", "opcheck", "gradcheck", "compile", "exact_distribution"),
)
# How work is shared among threads does not depend on the dtype: float32 is enough there.
LEFT_OUT_OF = {"address": (), "thread": ("dtype1", "dtype2", "bfloat16", "float16")}
LEFT_OUT_FILES = ("agreement", "harness", "kernels_core", "philox", "statistics")


def runtimes(kind: str) -> list[str] | None:
    """The sanitizer's libraries, or None where the compiler has none."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        return None
    paths = []
    for name in RUNTIMES[kind]:
        command = [compiler, f"-print-file-name={name}"]
        path = Path(subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip())
        if not path.is_absolute():  # the name alone: not found
            return None
        paths.append(str(path.resolve()))
    return paths


def build(kind: str) -> Path:
    """Builds the instrumented core and returns the module."""
    import pybind11

    folder = ROOT / "build" / f"sanitize-{kind}"
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "CMAKE_CXX_COMPILER": os.environ.get("CXX", "g++"),
        "CMAKE_BUILD_TYPE": "Release",
        "FASTGPT_CUDA": "off",
        "FASTGPT_SANITIZE": kind,
        "FASTGPT_LEVELS": LEVELS[kind],
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja may be there alone
    for command in (
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items())],
        ["cmake", "--build", folder],
    ):
        result = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "PATH": path})
        if result.returncode:
            raise SystemExit(f"make sanitize: the {kind} build fails:\n{result.stdout}{result.stderr}")
    (module,) = folder.glob("_C.*.so")
    return module


def without_random_addresses() -> list[str]:
    """Older ThreadSanitizers find no room among the addresses that newer kernels draw."""
    command = ["setarch", "-R"]
    works = shutil.which("setarch") and not subprocess.run([*command, "true"], capture_output=True).returncode
    return command if works else []


def run(kind: str, jobs: int, arguments: Sequence[str]) -> bool:
    """Builds, plants, tests; whether all is well."""
    began = time.monotonic()
    libraries = runtimes(kind)
    if libraries is None:
        names = " and ".join(RUNTIMES[kind][:-1])
        print(f"{kind}: the compiler has no {names}, so nothing was checked (Debian: in libgcc-*-dev, with g++)")
        return True
    module = build(kind)
    print(f"{kind}: built ({time.monotonic() - began:.0f} s)", flush=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "FASTGPT_C_LIBRARY": str(module),
        "FASTGPT_SANITIZED": kind,  # tests/ops/harness.py
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
        **OPTIONS[kind],
    }
    python = [sys.executable]
    if kind == "thread":
        python = [*without_random_addresses(), sys.executable]
        environment["FASTGPT_OWN_THREADS"] = "3"  # tests/conftest.py
    planted = [*python, "-m", "tests.sanitize.planted", kind]
    good = subprocess.run(planted, cwd=ROOT, env=environment).returncode == 0
    left_out = " and ".join(f"not {name}" for name in (*LEFT_OUT, *LEFT_OUT_OF[kind]))
    selection = ["tests/ops", "-m", "not slow and not gpu", "-k", left_out]
    selection += [f"--ignore=tests/ops/test_{name}.py" for name in LEFT_OUT_FILES]
    # A report goes to the process's standard error, which pytest must leave alone.
    plain = ["-q", "--capture=sys", "-p", "no:cacheprovider", "--benchmark-disable", "-n", str(jobs)]
    tests = [*python, "-m", "pytest", *plain, *selection, *arguments]
    good = subprocess.run(tests, cwd=ROOT, env=environment).returncode == 0 and good
    print(f"{kind}: {'nothing found' if good else 'FAILED'} ({time.monotonic() - began:.0f} s)", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.split("\n\n")[0])
    parser.add_argument("kinds", nargs="*", help="address, thread (default: both)")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="test processes at a time")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more arguments of pytest")
    options = parser.parse_args()
    kinds = options.kinds or list(RUNTIMES)
    if unknown := set(kinds) - set(RUNTIMES):
        parser.error(f"{', '.join(sorted(unknown))}: allowed are address and thread")
    outcomes = [run(kind, options.jobs, options.pytest) for kind in kinds]  # both, whatever the first says
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
