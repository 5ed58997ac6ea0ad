"""layer_norm against torch eager and torch.compile.

Bytes: forward reads x and writes y; backward reads x and dy and writes dx.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

ROWS, COLS = 4096, 768


@pytest.mark.quick(work="forward_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", ["plain", "residual"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_layer_norm(benchmark, work, residual, dtype):
    x, r = (torch.randn(ROWS, COLS, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(COLS, dtype=dtype, requires_grad=True) for _ in range(2))
    options = {"residual": r} if residual == "residual" else {}
    ours, peers = harness.sides(work, ops.layer_norm, x, (COLS,), weight, bias, **options)
    tensors = {"forward": 2, "forward_backward": 5}[work] + (2 if options else 0)
    flops = {"forward": 8, "forward_backward": 20}[work] * x.numel()
    moved = tensors * x.numel() * x.element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
