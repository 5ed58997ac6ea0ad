"""swiglu against torch eager and torch.compile, packed (one projection holds gate and up) and as two tensors.

Bytes: forward reads gate and up and writes y; backward reads dy, gate and up and writes dgate and dup.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

ROWS, COLS = 4096, 2048


@pytest.mark.quick(work="forward_backward", form="packed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["packed", "two"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_swiglu(benchmark, work, form, dtype):
    shapes = [(ROWS, 2 * COLS)] if form == "packed" else [(ROWS, COLS)] * 2
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    ours, peers = harness.sides(work, ops.swiglu, *inputs)
    tensors = {"forward": 3, "forward_backward": 8}[work]
    flops = {"forward": 5, "forward_backward": 16}[work] * ROWS * COLS
    moved = tensors * ROWS * COLS * inputs[0].element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
