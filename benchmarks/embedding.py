"""embedding of GPT-2's vocabulary with learned positions against torch eager and torch.compile.

Bytes: forward reads a row of each table and writes one for each token; backward reads the gradient once for each table
and writes both gradients whole (V x C is nearly all). Half of the tokens are among the first 6% of the vocabulary.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

B, T, V, C = 8, 1024, 50257, 768


@pytest.mark.quick(work="forward_backward", dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_embedding(benchmark, work, dtype):
    tokens = (torch.rand(B, T) ** 4 * V).long()
    weight, positions = (torch.randn(n, C, dtype=dtype, requires_grad=True) for n in (V, T))
    ours, peers = harness.sides(work, ops.embedding, tokens, weight, position_weight=positions)
    rows = {"forward": 3 * B * T, "forward_backward": 5 * B * T + V + T}[work]
    flops = {"forward": 1, "forward_backward": 3}[work] * B * T * C
    harness.versus(benchmark, ours, peers, bytes=rows * C * weight.element_size(), flops=flops)
