"""rotary against the usual PyTorch code, x * cos + rotate_half(x) * sin, on a (B, T, H, D) seen as (B, H, T, D).

Bytes: forward reads x and writes y; backward reads dy and writes dx.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

B, H, T, D = 4, 12, 1024, 64


@pytest.mark.quick(work="forward_backward", pairs="half")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_rotary(benchmark, work, pairs, dtype):
    x = torch.randn(B, T, H, D, dtype=dtype).transpose(1, 2).requires_grad_()
    cos, sin = ops.rotary_tables(T, D)
    ours, peers = harness.sides(work, ops.rotary, x, cos, sin, interleaved=pairs == "interleaved")
    tensors = {"forward": 2, "forward_backward": 4}[work]
    flops = 3 * x.numel() * {"forward": 1, "forward_backward": 2}[work]
    moved = tensors * x.numel() * x.element_size()
    harness.versus(benchmark, ours, peers, bytes=moved, flops=flops)
