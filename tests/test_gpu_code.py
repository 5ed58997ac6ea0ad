"""Planted faults in a kernel that nvcc compiles: each is seen in the cubin, held against the budget, and explained."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastgpt.gpu import budget, code, diagnosis, tools
from fastgpt.ops.native import _C

ROOT = Path(__file__).resolve().parents[1]
needs_nvcc = pytest.mark.skipif(
    tools.missing("nvcc", "cuobjdump", "nvdisasm") is not None,
    reason=str(tools.missing("nvcc", "cuobjdump", "nvdisasm")),
)

SOURCE = """
struct Bytes { unsigned char value[4]; };

namespace {
// Sound.
__global__ void __launch_bounds__(128) copy_kernel(float4* y, const float4* x) {
  __shared__ float4 tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
// An array that is indexed at run time.
__global__ void __launch_bounds__(128) local_kernel(float* y, const int* order) {
  float parts[16];
  for (int i = 0; i < 16; ++i) parts[i] = y[i * 128 + threadIdx.x];
  for (int i = 0; i < 16; ++i) y[i * 128 + threadIdx.x] = parts[order[i]];
}
// A struct of alignment 1.
__global__ void __launch_bounds__(128) bytes_kernel(Bytes* y, const Bytes* x) {
  y[threadIdx.x] = x[threadIdx.x];
}
// Many values live at once.
template <int kCount>
__global__ void __launch_bounds__(128) registers_kernel(float* y) {
  float v[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = y[i * 128 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) y[i * 128 + threadIdx.x] = v[kCount - 1 - i] * 2 + v[i];
}
}  // namespace

void* keep[] = {(void*)copy_kernel, (void*)local_kernel, (void*)bytes_kernel, (void*)registers_kernel<64>};
"""
RULES = """
[[rule]]
kernels = ["*"]
forbidden = ["LDL", "STL", "STG.U8"]
because = "planted"
[[rule]]
kernels = ["copy_kernel"]
required = ["LDG.128", "STG.128"]
because = "planted"
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda") / "planted.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def kernels(source):
    cubin = source.with_suffix(".cubin")
    code.compile_cubin(source, 80, cubin, strict=False)
    return {kernel.name: kernel for kernel in code.read_cubins([cubin])[0]}


@needs_nvcc
def test_what_a_cubin_says(kernels):
    assert set(kernels) == {"copy_kernel", "local_kernel", "bytes_kernel", "registers_kernel<64>"}
    copy = kernels["copy_kernel"]
    assert (copy.source, copy.architecture, copy.shared, copy.stack, copy.threads) == ("planted", 80, 2048, 0, 128)
    assert (copy.count("LDG.128"), copy.count("STG.128"), copy.count("BAR")) == (1, 1, 1)
    assert kernels["local_kernel"].stack == 64
    assert kernels["local_kernel"].count("LDL") > 0
    assert kernels["bytes_kernel"].count("STG.U8") == 4
    assert kernels["registers_kernel<64>"].registers > 64


@needs_nvcc
def test_static_shared_memory_is_the_kernels_own_on_every_architecture(source, tmp_path):
    """From sm_90 on, the tools count the kilobyte that the system reserves as well."""
    code.compile_cubin(source, 90, tmp_path / "planted.cubin", strict=False)
    found = {kernel.name: kernel.shared for kernel in code.read_cubins([tmp_path / "planted.cubin"])[0]}
    assert found == {"copy_kernel": 2048, "local_kernel": 0, "bytes_kernel": 0, "registers_kernel<64>": 0}


PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry store_kernel(.param .u64 to)
{
    .reg .u64 %a;
    ld.param.u64 %a, [to];
    st.global.u32 [%a], 7;
    ret;
}
.visible .entry empty_kernel()
{
    ret;
}
"""


@pytest.mark.skipif(
    tools.missing("ptxas", "cuobjdump", "nvdisasm") is not None,
    reason=str(tools.missing("ptxas", "cuobjdump", "nvdisasm")),
)
def test_cubins_that_are_read_at_once_are_told_apart(tmp_path):
    (tmp_path / "kernels.ptx").write_text(PTX)
    cubins = [tmp_path / f"{number}.{architecture}.cubin" for number in (0, 1) for architecture in (80, 90)]
    for cubin in cubins:
        architecture = cubin.name.split(".")[1]
        tools.run("ptxas", f"-arch=sm_{architecture}", tmp_path / "kernels.ptx", "-o", cubin)
    for cubin, kernels in zip(cubins, code.read_cubins(cubins), strict=True):
        alone = {"store_kernel": Counter(), "empty_kernel": Counter()}
        for instruction in code.instructions(cubin):
            alone[instruction.kernel][instruction.opcode] += 1
        assert {kernel.name: Counter(kernel.opcodes) for kernel in kernels} == alone
        assert alone["store_kernel"]["STG.E"] == 1


@needs_nvcc
def test_planted_violations_are_reported(kernels):
    measured = budget.measure(kernels.values(), {}, budget.parse(RULES))
    limits = budget.parse(budget.render(RULES, measured).replace("registers = 72", "registers = 40"))
    registers = kernels["registers_kernel<64>"].registers
    found = [str(v) for v in budget.check(kernels.values(), limits, {})]
    assert found[0] == "bytes_kernel on sm_80: 4 x STG.U8, which it must not have"
    assert any(s.startswith("local_kernel on sm_80: 64 bytes of local memory a thread") for s in found)
    assert any("x LDL, which it must not have" in s for s in found)
    assert f"registers_kernel<64> on sm_80: {registers} registers, 40 allowed" in found
    assert not any("copy_kernel" in s for s in found)


@needs_nvcc
def test_explanations_name_the_source_line(source):
    text = "\n".join(diagnosis.source_lines(source, "bytes_kernel", 80, ["STG.U8"], []))
    assert "4 x STG.U8 at" in text
    assert "planted.cu:20: y[threadIdx.x] = x[threadIdx.x];" in text
    text = "\n".join(diagnosis.source_lines(source, "registers_kernel<64>", 80, [], []))
    assert "live registers at" in text
    assert "v[kCount - 1 - i] * 2 + v[i]" in text


@needs_nvcc
def test_strict_compilation_refuses_local_memory(source, tmp_path):
    with pytest.raises(ValueError, match="nvcc failed"):
        code.compile_cubin(source, 80, tmp_path / "x.cubin")


@needs_nvcc
def test_a_library_gives_its_cubins_and_its_ptx(source, tmp_path):
    library = tmp_path / "planted.so"
    targets = ["-gencode", "arch=compute_80,code=[sm_80,compute_80]"]
    tools.run("nvcc", *targets, "-shared", "-cudart=static", "-Xcompiler=-fPIC", "-o", library, source)
    cache = tmp_path / "cache"
    found = code.read_module(library, also=(86,), cache=cache)
    assert {(k.name, k.architecture) for k in found if "copy" in k.name} == {("copy_kernel", 80), ("copy_kernel", 86)}
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert code.read_module(library, also=(86,), cache=cache) == found
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(tools, "_folders", lambda: iter(()))
    monkeypatch.setattr(tools.shutil, "which", lambda name: None)
    tools.find.cache_clear()
    try:
        with pytest.raises(tools.ToolMissingError, match=r"nvdisasm was not found on PATH.*\(pip install triton"):
            tools.find("nvdisasm")
        assert "install the CUDA toolkit" in tools.missing("nvcc")
    finally:
        tools.find.cache_clear()


def fastgpt(*arguments):
    return subprocess.run([sys.executable, "-m", "fastgpt", *arguments], cwd=ROOT, text=True, capture_output=True)


@pytest.mark.skipif(_C.cuda.compiled, reason="CUDA is in this build")
@pytest.mark.parametrize("command", [("explain", "--kernels", "--only", "cuda"), ("gate",)])
def test_without_cuda_the_commands_say_so(command):
    result = fastgpt(*command)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there are no compiled CUDA kernels here: CUDA was left out")


@pytest.mark.skipif(not _C.cuda.compiled, reason="CUDA is not in this build")
def test_kernels_are_listed():
    result = fastgpt("explain", "--kernels", "--only", "cuda", "--match", "swiglu_forward*", "--arch", "80")
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split()[:3] == ["kernel", "arch", "registers"]
    assert rows
    assert all(row.startswith("swiglu_forward") and " sm_80 " in row for row in rows)


def test_bad_arguments_of_explain():
    result = fastgpt("explain", "--kernels", "--arch", "75")
    assert (result.returncode, result.stderr.strip()) == (1, "error: --arch 75: allowed are 80, 86, 89, 90, 100, 120")
