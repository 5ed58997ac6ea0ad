"""The launching of Triton kernels without a GPU: tuning and its cache, empty grids, recording."""

import json
import os
import types

import pytest
import torch

from fastgpt.ops import native

if native.NO_TRITON:
    pytest.skip(native.NO_TRITON, allow_module_level=True)

import triton

from fastgpt.kernels import launch

CONFIGS = [triton.Config({"BLOCK": block}, num_warps=4, num_stages=2) for block in (32, 64, 128)]


class Kernel:
    """Stands for a function under @triton.jit, and notes what it is launched with."""

    __name__ = "copy_kernel"
    cache_key = "0123456789abcdef0123"

    def __init__(self):
        self.launches = []

    def __getitem__(self, extents):
        return lambda *args, **named: self.launches.append((extents, args, named))

    @property
    def blocks(self):
        return [named["BLOCK"] for _, _, named in self.launches]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A pretended GPU, on which a block of 64 is fastest. ``timed`` counts what was timed."""
    pretended = types.SimpleNamespace(timed=0, device=0, capturing=False, seconds={32: 3.0, 64: 1.0, 128: 2.0})

    def do_bench(run, warmup, rep):
        pretended.timed += 1
        config = run.args[-1]
        seconds = pretended.seconds[config.kwargs["BLOCK"]]
        if seconds is None:
            raise triton.runtime.errors.OutOfResources(300_000, 166_912, "shared memory")
        return seconds

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pretended.device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100/SXM")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pretended.capturing)
    monkeypatch.setattr(launch, "_target", lambda: launch.GPUTarget("cuda", 80, 32))
    monkeypatch.setattr(launch, "_decided", {})
    monkeypatch.delenv("FASTGPT_DETERMINISTIC", raising=False)
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path))
    return pretended


def run(kernel, shape_class=("bf16", 1024), grid=(8,), **options):
    launch.launch(kernel, grid, "x", configs=lambda target: CONFIGS, shape_class=shape_class, N=3, **options)


def cache_file(folder):
    (file,) = (folder / "triton").glob("*.json")
    return file


def test_the_fastest_runs_and_is_remembered(gpu, tmp_path, capsys):
    kernel = Kernel()
    run(kernel)
    assert kernel.blocks == [64]
    assert (
        capsys.readouterr().err == "fastgpt: timing 3 configurations of copy_kernel bf16 1024, once (a few seconds)\n"
    )
    assert cache_file(tmp_path).name == f"NVIDIA-A100-SXM-{triton.__version__}-0123456789abcdef.json"
    assert json.loads(cache_file(tmp_path).read_text()) == {"copy_kernel bf16 1024": str(CONFIGS[1])}
    run(kernel)
    assert gpu.timed == 3
    launch._decided.clear()  # as in another process
    run(kernel)
    gpu.device = 1  # another GPU of that kind
    run(kernel)
    assert (gpu.timed, kernel.blocks) == (3, [64, 64, 64, 64])
    assert capsys.readouterr().err == ""


def test_each_shape_class_is_timed(gpu, tmp_path):
    kernel = Kernel()
    run(kernel)
    gpu.seconds[128] = 0.5
    run(kernel, shape_class=("bf16", 2048))
    assert (kernel.blocks, gpu.timed) == ([64, 128], 6)
    assert set(json.loads(cache_file(tmp_path).read_text())) == {"copy_kernel bf16 1024", "copy_kernel bf16 2048"}
    assert [path.suffix for path in cache_file(tmp_path).parent.iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"copy_kernel bf16 1024": "BLOCK: 7"}', '{"copy_kernel bf16 1024": 5}'])
def test_a_file_that_is_of_no_use_is_replaced(gpu, tmp_path, text):
    run(Kernel())
    cache_file(tmp_path).write_text(text)
    launch._decided.clear()
    kernel = Kernel()
    run(kernel)
    assert (kernel.blocks, gpu.timed) == ([64], 6)
    assert json.loads(cache_file(tmp_path).read_text()) == {"copy_kernel bf16 1024": str(CONFIGS[1])}


def test_other_processes_answers_are_kept(gpu, tmp_path):
    run(Kernel())
    cache_file(tmp_path).write_text('{"other_kernel": "BLOCK: 1"}')
    run(Kernel(), shape_class=("f16",))
    assert set(json.loads(cache_file(tmp_path).read_text())) == {"other_kernel", "copy_kernel f16"}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_is_no_error(gpu, tmp_path):
    tmp_path.chmod(0o500)
    kernel = Kernel()
    run(kernel)
    assert kernel.blocks == [64]


def test_a_cache_below_a_file_is_no_error(gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "file"))
    kernel = Kernel()
    run(kernel)
    assert kernel.blocks == [64]


@pytest.mark.parametrize("by", ["environment", "torch"])
def test_determinism_takes_the_first(gpu, by, monkeypatch, tmp_path, capsys):
    if by == "environment":
        monkeypatch.setenv("FASTGPT_DETERMINISTIC", "1")
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    kernel = Kernel()
    run(kernel)
    assert (kernel.blocks, gpu.timed, list(tmp_path.iterdir())) == ([32], 0, [])
    assert capsys.readouterr().err == ""


def test_capture_takes_the_first_and_decides_nothing(gpu):
    kernel = Kernel()
    gpu.capturing = True
    run(kernel)
    gpu.capturing = False
    run(kernel)
    gpu.capturing = True
    run(kernel)
    assert (kernel.blocks, gpu.timed) == ([32, 64, 64], 3)


def test_what_does_not_fit_is_skipped(gpu, tmp_path):
    gpu.seconds[64] = None
    kernel = Kernel()
    run(kernel)
    assert kernel.blocks == [128]
    gpu.seconds = dict.fromkeys(gpu.seconds)
    run(kernel, shape_class=("f32",))
    assert kernel.blocks == [128, 32]  # nothing fits: the launch itself will say so
    assert set(json.loads(cache_file(tmp_path).read_text())) == {"copy_kernel bf16 1024"}


def test_one_configuration_is_never_timed(gpu):
    kernel = Kernel()
    launch.launch(kernel, lambda c: (c["BLOCK"],), "x", configs=launch.one_config(BLOCK=16, num_warps=8), N=3)
    assert gpu.timed == 0
    assert kernel.launches == [
        ((16,), ("x",), {"N": 3, "BLOCK": 16, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True})
    ]


def test_an_empty_grid_launches_nothing(gpu):
    kernel = Kernel()
    run(kernel, grid=(4, 0))
    launch.launch(kernel, lambda c: (0,), configs=launch.one_config(BLOCK=16))
    assert (kernel.launches, gpu.timed) == ([], 0)


def test_recording_runs_nothing_and_nests(gpu):
    kernel = Kernel()
    with launch.recording() as outer:
        run(kernel)
        with launch.recording() as inner:
            run(kernel, fp_fusion=False)
        run(kernel, grid=(0,))
    assert (len(outer), len(inner), kernel.launches) == (2, 1, [])
    assert inner[0].constants == {"N": 3}
    assert inner[0].options == {"enable_fp_fusion": False}
    run(kernel)
    assert kernel.blocks == [64]


def test_a_target_is_asked_for_once(monkeypatch):
    asked = []
    targets = {0: launch.GPUTarget("cuda", 80, 32), 1: launch.GPUTarget("cuda", 90, 32)}

    class Driver:
        device = 0

        def get_current_device(self):
            return self.device

        def get_current_target(self):
            asked.append(self.device)
            return targets[self.device]

    driver = Driver()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch, "_targets", {})
    found = []
    for driver.device in (0, 1, 1, 0):
        found.append(launch._target().arch)
    assert (found, asked) == ([80, 90, 90, 80], [0, 1])
