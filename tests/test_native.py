"""The native core: it knows no torch, each instruction-set level stands alone, and its door refuses wrong arguments."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.ops import native
from fastgpt.ops.native import _C

ROOT = Path(__file__).resolve().parents[1]


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, env={**os.environ, **environment}
    )


def test_sources_include_no_torch_header():
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
        assert not [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))], path


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf (binutils)")
def test_library_is_not_linked_to_torch():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], text=True, capture_output=True, check=True).stdout
    assert "libstdc++" in dynamic
    assert not re.search(r"NEEDED.*(torch|c10)", dynamic)


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
def test_levels_share_no_inline_function():
    """A weak symbol outside a level's namespace could be the AVX-512 copy that the linker gives to every level."""
    objects = list(ROOT.glob("build/cmake-*/CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("the native core was not built in this checkout")
    for path in objects:
        level = re.search(r"cpu_(\w+)\.dir", str(path))[1]
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], text=True, capture_output=True, check=True
        ).stdout
        weak = re.findall(r"^\S+ [WVu] (.*)$", symbols, re.M)
        strangers = [s for s in weak if f"fastgpt::{level}::" not in s and not s.startswith("DW.ref.")]
        assert not strangers, f"{path.name} at level {level}: {strangers[:3]}"


def test_isa_environment_variable():
    slowest = _C.cpu.isas()[0][0]
    result = python("from fastgpt.ops.native import _C; print(_C.cpu.isa())", FASTGPT_CPU_ISA=slowest)
    assert result.stdout.strip() == slowest


def test_unknown_isa_is_refused():
    result = python("import fastgpt", FASTGPT_CPU_ISA="avx1024")
    assert result.returncode != 0
    assert "FASTGPT_CPU_ISA='avx1024' is not a level of this build; allowed here: baseline" in result.stderr


def test_isa_that_the_machine_lacks_is_refused(monkeypatch):
    class Old:
        def set_isa(self, name):
            return name == "baseline"

        def isas(self):
            return [("baseline", "x86-64-v2", True), ("avx512", "x86-64-v4", False)]

    monkeypatch.setattr(native, "_C", type("C", (), {"cpu": Old()}))
    monkeypatch.setenv("FASTGPT_CPU_ISA", "avx512")
    with pytest.raises(ImportError, match=r"avx512 needs x86-64-v4, which this machine lacks; it has: baseline"):
        native._choose_isa()


def test_threads_are_torch_s(restore_threads):
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert _C.thread_count() == threads


def test_own_loop_without_torch_gives_the_same_bits():
    """Another process, since the pool is set once at import."""
    code = """
import torch
from fastgpt import ops
from fastgpt.ops.native import _C
torch.manual_seed(0)
x = torch.randn(512, 384)
with_torch = ops.layer_norm(x, (384,), backend="cpu")
_C.set_parallel_functions(0, 0)
_C.set_own_threads(3)
assert _C.thread_count() == 3
assert torch.equal(with_torch, ops.layer_norm(x, (384,), backend="cpu"))
print("same")
"""
    assert python(code).stdout.strip() == "same"


def test_fields_are_checked():
    with pytest.raises(TypeError, match="layer_norm_forward: missing field 'y'"):
        _C.cpu.layer_norm_forward()
    fields = dict.fromkeys(("y", "sum", "mean", "rstd", "x", "residual", "weight", "bias"))
    fields |= {"rows": 0, "cols": 1, "eps": 1e-5, "dtype": 0, "weight_dtype": 0}
    with pytest.raises(TypeError, match=r"unknown field .*'colour'"):
        _C.cpu.layer_norm_forward(**fields, colour=1)
    with pytest.raises(TypeError, match="field 'rows'"):
        _C.cpu.layer_norm_forward(**{**fields, "rows": "many"})
    with pytest.raises(TypeError, match="no kernel for dtype code 9"):
        _C.cpu.layer_norm_forward(**{**fields, "dtype": 9})


class Emulator:
    """Stands for fastgpt._simt: one kernel, which fills its workspace and says what it was given."""

    def double(self, y, x, stream, allocate):
        assert stream == 0
        ctypes.memset(allocate(1 << 20), 7, 1 << 20)
        ctypes.memset(allocate(64), 8, 64)  # the first is still there
        ctypes.c_float.from_address(y).value = 2 * ctypes.c_float.from_address(x).value


def double(kernels, x):
    y = torch.empty(())
    kernels.double(y=y.data_ptr(), x=x.data_ptr())
    return y


def use_emulator(monkeypatch, emulator, checked=None):
    for name, module in (("_simt", emulator), ("_simt_checked", checked)):
        monkeypatch.setattr(native, name, module)
    monkeypatch.setattr(native, "_simt_kernels", native._DeviceKernels("simt", emulator, "cpu", lambda: 0))
    monkeypatch.setattr(native, "_checked_kernels", native._DeviceKernels("simt", checked, "cpu", lambda: 0))


def test_device_kernels_get_a_stream_and_workspace(monkeypatch):
    use_emulator(monkeypatch, Emulator())
    run = native.backends(double)["simt"]
    assert [run(torch.tensor(x)).item() for x in (1.5, 4.0)] == [3.0, 8.0]
    with pytest.raises(NotImplementedError, match=r"treble: this build has no kernel of that name for backend='simt'"):
        native.backends(lambda kernels, x: kernels.treble(x=1))["simt"](torch.tensor(1.0))


def test_an_emulator_that_was_not_built_is_named(monkeypatch):
    use_emulator(monkeypatch, None)
    assert native.missing("simt", "gelu") == "the emulator is not in this build: build with FASTGPT_SIMT=on"
    with pytest.raises(NotImplementedError, match=r"backend='simt': the emulator .* build with FASTGPT_SIMT=on"):
        native.backends(double)["simt"](torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match=r"checked_simt: the emulator .* build with FASTGPT_SIMT=on"):
        native.checked_simt().__enter__()


@pytest.mark.skipif(_C.cuda.compiled, reason="this build has CUDA")
def test_cuda_that_was_not_built_is_named():
    assert not native.has_kernel("cuda", "gelu")
    with pytest.raises(NotImplementedError, match="backend='cuda': CUDA is not in this build"):
        native.backends(double)["cuda"](torch.tensor(1.0))


def test_an_operator_needs_all_of_its_kernels(monkeypatch):
    has = type("Emulator", (), dict.fromkeys(("adamw", "cross_entropy_forward", "cross_entropy_backward"), print))()
    monkeypatch.setattr(native, "_simt", has)
    assert native.missing("simt", "adamw") == "there is no CUDA kernel grad_norm"
    assert native.missing("simt", "gelu") == "there is no CUDA kernel gelu_forward or gelu_backward"
    assert native.has_kernel("simt", "cross_entropy")
    assert native.has_kernel("simt", "linear_cross_entropy")
    assert native.has_kernel("cpu", "adamw")


def test_the_checker_knows_the_extent_of_every_tensor(monkeypatch):
    calls = []

    class Checker(Emulator):
        def register_region(self, address, bytes):
            calls.append((address, bytes))

        def clear_regions(self):
            calls.append("clear")

    use_emulator(monkeypatch, Emulator(), Checker())
    x = torch.arange(24.0).view(4, 6)[1:, 1:3]
    run = native.backends(double)["simt"]
    run(x)
    assert not calls
    with native.checked_simt():
        assert run(x).item() == 14.0
    assert calls[1] == (x.data_ptr(), 4 * (2 * 6 + 1 + 1))
    assert [c if c == "clear" else c[1] for c in calls] == [4, 56, 1 << 20, 64, "clear"]
    with native.checked_simt():
        run(torch.tensor(1.0))
    assert calls.count("clear") == 2
    run(x)
    assert calls.count("clear") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("on", r"FASTGPT_CUDA=on, but nvcc was not found"),
        ("maybe", r"FASTGPT_CUDA is 'maybe': allowed are auto, on, off"),
    ],
)
def test_cuda_switch_says_what_is_wrong(value, message, tmp_path):
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 outside pip's build isolation")
    tools = tmp_path / "bin"  # a PATH with everything that the configure step needs, but no nvcc
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "cc", "ld", "as", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    result = subprocess.run(
        ["cmake", f"-S{ROOT}", f"-B{tmp_path / 'build'}", "-GNinja", f"-DFASTGPT_CUDA={value}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        text=True, capture_output=True, env={**os.environ, "PATH": str(tools), "CUDACXX": ""},
    )  # fmt: skip
    assert result.returncode != 0
    assert re.search(message, " ".join(result.stderr.split()))
