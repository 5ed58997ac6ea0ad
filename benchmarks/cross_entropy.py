"""cross_entropy against torch eager and torch.compile.

Bytes: forward reads the logits; backward reads them and writes their gradient.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

# GPT-2's vocabulary at one batch of 1024 positions, and bytes at the demo's batch.
SHAPES = {"gpt2": (1024, 50257), "bytes": (4096, 256)}


@pytest.mark.quick(work="forward_backward", shape="gpt2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_cross_entropy(benchmark, work, shape, dtype):
    rows, classes = SHAPES[shape]
    logits = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    target = torch.randint(classes, (rows,))
    ours, peers = harness.sides(work, ops.cross_entropy, logits, target)
    passes = {"forward": 1, "forward_backward": 3}[work]
    flops = {"forward": 4, "forward_backward": 7}[work] * logits.numel()
    moved = passes * logits.numel() * logits.element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
