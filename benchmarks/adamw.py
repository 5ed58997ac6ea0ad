"""fastgpt.AdamW against torch.optim.AdamW(fused=True), clipping with torch.nn.utils.clip_grad_norm_.

20M parameters in the 148 tensors of a GPT-2. Bytes, float32: p, grad, m, v read and p, m, v written; clipping reads
the gradients once more. bfloat16: ours keeps float32 averages and a master (28 bytes an element); torch's averages are
bfloat16 (14), so it moves half as much and loses small updates.
"""

import pytest
import torch

import fastgpt
from benchmarks import harness
from fastgpt import ops

TENSORS, ELEMENTS = 148, 135_000


@pytest.mark.quick(clip="clipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["plain", "clipped"])
def test_adamw(benchmark, clip, dtype):
    ours, theirs = ([torch.randn(ELEMENTS, dtype=dtype) for _ in range(TENSORS)] for _ in range(2))
    for p in (*ours, *theirs):
        p.grad = torch.randn_like(p)
    optimizer = fastgpt.AdamW(ours, lr=1e-3, max_grad_norm=1.0 if clip == "clipped" else None)
    peer = torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    def torch_fused():
        if clip == "clipped":
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        peer.step()

    size = 28 + (dtype.itemsize if clip == "clipped" else 0)
    elements = TENSORS * ELEMENTS
    flops = (15 + 2 * (clip == "clipped")) * elements
    harness.versus(benchmark, optimizer.step, {"torch_fused": torch_fused}, bytes=size * elements, flops=flops)


def test_grad_norm(benchmark):
    grads = [torch.randn(ELEMENTS) for _ in range(TENSORS)]
    peers = {"torch": lambda: torch.nn.utils.get_total_norm(grads)}
    harness.versus(
        benchmark, lambda: ops.grad_norm(grads), peers, bytes=4 * TENSORS * ELEMENTS, flops=2 * TENSORS * ELEMENTS
    )
