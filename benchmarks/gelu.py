"""gelu against torch eager and torch.compile.

Bytes: forward reads x and writes y; backward reads x and dy and writes dx.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

ROWS, COLS = 4096, 3072


@pytest.mark.quick(work="forward_backward", approximate="tanh", bias="plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", ["plain", "bias"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_gelu(benchmark, work, approximate, bias, dtype):
    x = torch.randn(ROWS, COLS, dtype=dtype, requires_grad=True)
    options = {"bias": torch.randn(COLS, dtype=dtype, requires_grad=True)} if bias == "bias" else {}
    ours, peers = harness.sides(work, ops.gelu, x, approximate, **options)
    tensors = {"forward": 2, "forward_backward": 5}[work]
    flops = {"none": 5, "tanh": 9}[approximate] * {"forward": 1, "forward_backward": 3}[work] * x.numel()
    moved = tensors * x.numel() * x.element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
