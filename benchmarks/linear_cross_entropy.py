"""linear_cross_entropy against cross_entropy(linear) and torch's own.

Flops: those of the GEMMs, one in the forward and three with gradients. Bytes: x and weight, and their gradients.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from fastgpt import ops

ROWS, FEATURES, CLASSES = 1024, 768, 50257  # GPT-2 124M's head over 1024 positions


@pytest.mark.quick(work="forward", dtype=torch.bfloat16)
@pytest.mark.long(work="forward")
@pytest.mark.long(dtype=torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_linear_cross_entropy(benchmark, work, dtype):
    x = torch.randn(ROWS, FEATURES, dtype=dtype, requires_grad=True)
    weight = (torch.randn(CLASSES, FEATURES) * 0.02).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (ROWS,))
    ours, peers = harness.sides(work, ops.linear_cross_entropy, x, weight, target)
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = getattr(harness, work)(F.linear_cross_entropy, x, weight, target)
    else:
        peers["F.linear_cross_entropy"] = harness.Missing(f"torch {torch.__version__} has none")
    gemms = {"forward": 1, "forward_backward": 3}[work]
    passes = {"forward": 1, "forward_backward": 3}[work]  # read; read again, and both gradients written
    moved = passes * (ROWS + CLASSES) * FEATURES * dtype.itemsize
    harness.versus(benchmark, ours, peers, bytes=moved, flops=gemms * 2 * ROWS * FEATURES * CLASSES)
