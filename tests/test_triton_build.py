"""The compilation of Triton kernels without a GPU: planted faults are found, and every operator is in the catalogue."""

import json
import os
import signal
import subprocess
import sys

import pytest

from fastgpt.gpu import budget, catalogue, triton_build
from fastgpt.gpu.code import ROOT
from fastgpt.ops import native, registry

needs_triton = pytest.mark.skipif(bool(native.NO_TRITON), reason=native.NO_TRITON)

RULES = """
[[rule]]
kernels = ["*"]
forbidden = ["LDL", "STL"]
because = "spills"
[[rule]]
kernels = ["copy_kernel*"]
required = ["LDG.128", "STG.128"]
because = "narrow"
[[rule]]
kernels = ["dot_kernel<dot*"]
on = ["sm_80"]
required = ["HMMA"]
because = "tensor cores"
[[rule]]
kernels = ["dot_kernel<dot*"]
on = ["sm_90"]
required = ["HGMMA"]
because = "tensor cores"
"""
ALIGNED = "copy_kernel<aligned, BLOCK=1024 warps=4 stages=2>"
LARGE = "dot_kernel<too large, SIZE=256 warps=16 stages=2>"


def test_every_operator_is_in_the_catalogue():
    assert set(triton_build.operators()) == set(registry.operators())
    labels = [(case.op, case.label) for case in catalogue.cases()]
    assert len(set(labels)) == len(labels)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "rules.toml").write_text(RULES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    architectures = ["sm_80", "sm_86", "sm_89", "sm_90", "gfx942"]
    command = [sys.executable, "-m", "tests.triton_planted", str(folder), *architectures]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((folder / "found.json").read_text())


@needs_triton
@pytest.mark.slow
def test_code_is_compiled_once(planted):
    """Equal launches give one variant, and an architecture has code of its own where its configurations differ."""
    compiled = [(name, architecture) for name, architecture, _ in planted["compiled"]]
    assert not any("again" in name for name, _ in compiled)
    assert [a for name, a in compiled if name == ALIGNED] == ["sm_80", "sm_90", "gfx942"]
    assert ("copy_kernel<by architecture, BLOCK=256 warps=4 stages=3>", "sm_86") in compiled
    assert planted["also"][ALIGNED] == [86, 89]
    assert planted["also"]["copy_kernel<by architecture, BLOCK=1024 warps=4 stages=3>"] == []


@needs_triton
@pytest.mark.slow
def test_specialised_as_in_production(planted):
    assert planted["opcodes"][f"{ALIGNED} 80"]["LDG.E.128"] == 1
    assert f"{ALIGNED} on sm_80, sm_90: no LDG.128, which it must have" not in planted["violations"]
    odd = ALIGNED.replace("aligned", "odd length")
    assert f"{odd} on sm_80, sm_90: no LDG.128, which it must have" in planted["violations"]


@needs_triton
@pytest.mark.slow
def test_each_architecture_multiplies_by_its_own_instruction(planted):
    assert not any("dot_kernel<dot" in violation for violation in planted["violations"])
    opcodes = planted["opcodes"]["dot_kernel<dot, SIZE=64 warps=4 stages=2> 90"]
    assert not any(name.startswith("HMMA") for name in opcodes)


@needs_triton
@pytest.mark.slow
def test_faults_are_found(planted):
    found = planted["violations"]
    assert f"{LARGE} on sm_80: cannot be launched: not one block fits an SM's shared memory" in found
    assert f"{LARGE}: 131072 bytes of shared memory on gfx942, which has 65536" in found
    for pattern in (f"{LARGE} on sm_80: * x LDL, which it must not have", f"{LARGE}: * registers spilt on gfx942"):
        start, end = pattern.split("*")
        assert any(v.startswith(start) and v.endswith(end) for v in found), pattern
    broken = "broken_kernel<not a power of two, SIZE=100 warps=4 stages=2>"
    assert any(v.startswith(f"{broken} on sm_80: does not compile: CompilationError") for v in found)
    assert any(v.startswith(f"{broken}: does not compile for gfx942: CompilationError") for v in found)


def test_a_compiler_that_aborts_takes_nobody_along():
    assert triton_build._tried_aside(os.abort) == signal.SIGABRT
    assert triton_build._tried_aside(lambda: None) == 0
    assert triton_build._tried_aside(lambda: 1 / 0) == 0  # raised again where it can be reported


def test_the_budget_of_this_checkout_is_sound():
    own = budget.load(ROOT / "kernels" / "budget.toml")
    assert any("LDL" in rule.forbidden and rule.kernels == ("*",) for rule in own.rules)
