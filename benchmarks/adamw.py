"""fastgpt.AdamW against torch.optim.AdamW(fused=True), clipping with torch.nn.utils.clip_grad_norm_.

The 148 tensors of GPT-2 124M, or 20M parameters in as many of one size. Clipping is compared with both, torch's step
alone and after its clipping. Bytes, float32: p, grad, m, v read and p, m, v written; clipping reads
the gradients once more. bfloat16: ours keeps float32 averages and a master (28 bytes an element); torch's averages are
bfloat16 (14), so it moves half as much and loses small updates.
"""

import math

import pytest
import torch

import fastgpt
from benchmarks import harness
from fastgpt import ops

C, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024
LAYER = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,), (C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
SHAPES = {"20M": [(135_000,)] * 148, "124M": [(VOCABULARY, C), (CONTEXT, C), *LAYER * LAYERS, (C,), (C,)]}
ELEMENTS = {size: sum(math.prod(shape) for shape in shapes) for size, shapes in SHAPES.items()}


@pytest.mark.quick(clip="clipped", size="20M")
@pytest.mark.long(size="124M")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", ["plain", "clipped"])
@pytest.mark.parametrize("size", SHAPES)
def test_adamw(benchmark, size, clip, dtype):
    ours, theirs = ([torch.randn(shape, dtype=dtype) for shape in SHAPES[size]] for _ in range(2))
    for p in (*ours, *theirs):
        p.grad = torch.randn_like(p)
    optimizer = fastgpt.AdamW(ours, lr=1e-3, max_grad_norm=1.0 if clip == "clipped" else None)
    peer = torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    def torch_fused_clipped():
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        peer.step()

    peers = {"torch_fused": peer.step}
    if clip == "clipped":
        peers["torch_fused after clip_grad_norm_"] = torch_fused_clipped
    moved = 28 + (dtype.itemsize if clip == "clipped" else 0)
    elements = ELEMENTS[size]
    flops = (15 + 2 * (clip == "clipped")) * elements
    harness.versus(benchmark, optimizer.step, peers, bytes=moved * elements, flops=flops)


def test_grad_norm(benchmark):
    elements = ELEMENTS["20M"]
    grads = [torch.randn(shape) for shape in SHAPES["20M"]]
    peers = {"torch": lambda: torch.nn.utils.get_total_norm(grads)}
    harness.versus(benchmark, lambda: ops.grad_norm(grads), peers, bytes=4 * elements, flops=2 * elements)
