"""fastgpt.AdamW against torch.optim.AdamW(fused=True), clipping with torch.nn.utils.clip_grad_norm_.

20M or GPT-2's 124M parameters in 148 tensors. Bytes, float32: p, grad, m, v read and p, m, v written; clipping reads
the gradients once more. bfloat16: ours keeps float32 averages and a master (28 bytes an element); torch's averages are
bfloat16 (14), so it moves half as much and loses small updates.
"""

import pytest
import torch

import fastgpt
from benchmarks import harness
from fastgpt import ops

TENSORS = 148
ELEMENTS = {"20M": 135_000, "124M": 840_000}  # of a tensor


@pytest.mark.quick(clip="clipped", size="20M")
@pytest.mark.long(size="124M")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["plain", "clipped"])
@pytest.mark.parametrize("size", ELEMENTS)
def test_adamw(benchmark, size, clip, dtype):
    ours, theirs = ([torch.randn(ELEMENTS[size], dtype=dtype) for _ in range(TENSORS)] for _ in range(2))
    for p in (*ours, *theirs):
        p.grad = torch.randn_like(p)
    optimizer = fastgpt.AdamW(ours, lr=1e-3, max_grad_norm=1.0 if clip == "clipped" else None)
    peer = torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    def torch_fused():
        if clip == "clipped":
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        peer.step()

    moved = 28 + (dtype.itemsize if clip == "clipped" else 0)
    elements = TENSORS * ELEMENTS[size]
    flops = (15 + 2 * (clip == "clipped")) * elements
    harness.versus(benchmark, optimizer.step, {"torch_fused": torch_fused}, bytes=moved * elements, flops=flops)


def test_grad_norm(benchmark):
    elements = TENSORS * ELEMENTS["20M"]
    grads = [torch.randn(ELEMENTS["20M"]) for _ in range(TENSORS)]
    peers = {"torch": lambda: torch.nn.utils.get_total_norm(grads)}
    harness.versus(benchmark, lambda: ops.grad_norm(grads), peers, bytes=4 * elements, flops=2 * elements)
