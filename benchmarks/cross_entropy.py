"""cross_entropy against torch eager and torch.compile.

Bytes: forward reads the logits; with the gradient, that is written. The backward starts from 1, as loss.backward()
does, or with "scaled" from another number: ours then goes over the gradient again.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

# GPT-2's vocabulary at one batch of 1024 positions, and bytes at the demo's batch.
SHAPES = {"gpt2": (1024, 50257), "bytes": (4096, 256)}


@pytest.mark.quick(work="forward_backward", shape="gpt2")
@pytest.mark.long(work="forward_backward_scaled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("work", ["forward", "forward_backward", "forward_backward_scaled"])
def test_cross_entropy(benchmark, work, shape, dtype):
    rows, classes = SHAPES[shape]
    logits = torch.randn(rows, classes, dtype=dtype, requires_grad=True)
    target = torch.randint(classes, (rows,))
    forward, options = work == "forward", {}
    if not forward:
        options["upstream"] = [torch.full((), 0.7 if work.endswith("scaled") else 1.0, dtype=dtype)]
    ours, peers = harness.sides(work.removesuffix("_scaled"), ops.cross_entropy, logits, target, **options)
    flops = (4 if forward else 6) * logits.numel()
    moved = (1 if forward else 2) * logits.numel() * logits.element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
