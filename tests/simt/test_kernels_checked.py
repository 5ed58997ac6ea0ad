"""Every CUDA kernel on the checking emulator: no races, no stray accesses, nothing read that was not written."""

import re
from pathlib import Path

import pytest
import torch

from fastgpt.ops import native
from tests.simt.calls import CALLS

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
_checked = pytest.importorskip("fastgpt._simt_checked", reason="this build has no emulator (FASTGPT_SIMT=on)")

SCHEDULES = [("random", 1, True), ("reverse", 0, False)]


@pytest.fixture(autouse=True)
def _forward_again():
    yield
    _checked.configure()


@pytest.mark.parametrize("name", CALLS)
def test_checked(name):
    torch.manual_seed(0)
    for order, seed, lazy in SCHEDULES:
        _checked.configure(order=order, seed=seed, lazy_copies=lazy)
        with native.checked_simt():
            CALLS[name]()


def test_the_calls_launch_every_kernel():
    """A kernel that the checker never ran is a kernel that nobody checked."""
    written = set()
    for path in (*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")):
        written |= set(re.findall(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", path.read_text()))
    torch.manual_seed(0)
    _checked.count_requests(True)
    try:
        with native.checked_simt():
            for run in CALLS.values():
                run()
        launched = {entry["kernel"].split("<")[0] for entry in _checked.requests()}
    finally:
        _checked.count_requests(False)
    assert written, "no kernels were found in csrc/cuda"
    assert written == launched
