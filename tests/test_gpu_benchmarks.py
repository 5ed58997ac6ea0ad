"""`make gpu` without a GPU: its cases run on the CPU, its report is written, its refusals are clear."""

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu, harness
from fastgpt.cli import gpu as command
from fastgpt.gpu.code import ROOT
from fastgpt.gpu.predictions import DEVICES, SHAPES, Shape
from fastgpt.ops import native, registry

TINY = Shape("tiny", B=1, T=8, H=2, KV=1, D=16, F=24, V=50, P=4000, S=9)


def test_cuda_stands_beside_triton(monkeypatch):
    monkeypatch.setitem(native.DEVICE_TYPES, "triton", "cuda")
    monkeypatch.setattr(registry, "_MISSING", {})
    assert gpu._ours("gelu", torch.device("cuda")) == ["cuda", "triton"]
    monkeypatch.setattr(registry, "_MISSING", {("gelu", "cuda"): "no nvcc"})
    assert gpu._ours("gelu", torch.device("cuda")) == ["triton"]


def test_every_case_runs(monkeypatch):
    monkeypatch.setitem(native.DEVICE_TYPES, "triton", "cuda")  # not in the interpreter, which takes its time

    def timer(call):
        call()
        return 1.0

    torch.manual_seed(0)
    rows = gpu.run(timer, torch.device("cpu"), "H100", (TINY,), compiled=False)
    assert len({row["case"] for row in rows}) == len(rows) >= 15
    for row in rows:
        assert row["failed"] == {}, row
        assert row["owner"] == "cpu"
        assert row["seconds"]["cpu"] == 1.0
        assert len(row["seconds"]) >= 2
        assert row["floor"] is None or row["floor"] > 0


def test_a_call_that_fails_is_reported(monkeypatch):
    def broken():
        raise RuntimeError("no such kernel\nmore")

    case = gpu.Case("x", "gelu", (), {"cpu": lambda: None, "peer": broken})
    monkeypatch.setattr(gpu, "cases", lambda shape, device, compiled: iter([case]))
    (row,) = gpu.run(lambda call: 2.0, torch.device("cpu"), "?", (TINY,))
    assert row["failed"] == {"peer": "RuntimeError: no such kernel"}
    assert row["seconds"] == {"cpu": 2.0}


def test_calls_take_turns():
    order = []
    medians = harness.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, lambda call: call() or 10.0
    )
    assert medians == {"a": 10.0, "b": 10.0}
    assert order == ["a", "b"] * 5  # two rounds of warm-up, and the fewest rounds


@pytest.mark.parametrize(
    ("name", "device"),
    [("NVIDIA A100-SXM4-80GB", DEVICES[0]), ("NVIDIA H100 80GB HBM3", DEVICES[1]), ("NVIDIA T4", None)],
)
def test_data_sheets_are_found_by_name(name, device):
    assert gpu.known_device(name) == device


def test_the_report(tmp_path):
    rows = [
        {
            "shape": SHAPES[0].name,
            "case": "gelu forward",
            "owner": "cuda",
            "seconds": {"cuda": 1e-4, "triton": 1.5e-4, "torch": 2e-4, "Liger": 1.1e-4},
            "floor": 5e-5,
            "failed": {"torch.compile": "RuntimeError: no"},
            "missing": {"flash-attn": "not installed"},
        },
        {
            "shape": SHAPES[0].name,
            "case": "sample",
            "owner": "triton",
            "seconds": {},
            "floor": None,
            "failed": {"triton": "Error: x"},
            "missing": {},
        },
    ]
    steps = [
        command.Step("tests", 0, 12.5, "100 passed"),
        command.Step("compute-sanitizer memcheck", 1, 3.0, "ERROR SUMMARY: 2 errors"),
        command.Step("compute-sanitizer racecheck", None, 0.0, "compute-sanitizer was not found"),
    ]
    path = tmp_path / "gpu.md"
    command.write_report(path, {"device": "a fake", "driver": "1.2"}, steps, rows)
    text = path.read_text()
    assert "| device | a fake |" in text
    assert "| tests | passed | 12 s | 100 passed |" in text
    assert "| compute-sanitizer memcheck | **failed** (status 1) | 3 s | ERROR SUMMARY: 2 errors |" in text
    assert "| compute-sanitizer racecheck | not run | | compute-sanitizer was not found |" in text
    assert "| case | owner | CUDA | Triton | torch | of the floor | the owner is | failed or missing |" in text
    ratios = "1.50x Triton, 2.00x torch, 1.10x Liger"
    absent = "torch.compile: RuntimeError: no; flash-attn: not installed"
    assert f"| gelu forward | CUDA | 100.0 us | 150.0 us | 200.0 us | 50 % | {ratios} | {absent} |" in text
    assert "| sample | Triton | - | - | - | | | triton: Error: x |" in text
    assert not list(tmp_path.glob("*.tmp"))


def test_steps_keep_the_last_line(tmp_path):
    step = command.run_step("greeting", [sys.executable, "-c", "print('a'); print('2 passed')"], {}, tmp_path)
    assert (step.status, step.summary) == (0, "2 passed")
    assert (tmp_path / "greeting.log").read_text() == "a\n2 passed\n"
    step = command.run_step("broken", [sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path)
    assert step.status == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = subprocess.run([sys.executable, "-m", "fastgpt", "gpu"], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: there is no GPU to run on: ")
    result = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, text=True, capture_output=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no GPU that torch can use" in result.stderr


def test_unknown_steps_are_refused():
    result = subprocess.run(
        [sys.executable, "-m", "fastgpt", "gpu", "--skip", "dance"], cwd=ROOT, text=True, capture_output=True
    )
    assert result.returncode == 2
    assert "'dance' is not one of 'build', 'tests', 'sanitizer', 'benchmarks'" in " ".join(
        result.stderr.replace("│", " ").split()
    )
