"""attention against torch's scaled_dot_product_attention, which torch.compile calls as it is.

Flops: 4 T S D a head forward, 2.5 times that backward.

Bytes: forward reads q, k, v and writes the output; backward reads these and the output's gradient and writes three.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import ops

HEADS, DIM = 12, 64


def versus(benchmark, work, tensors, flops, **options):
    make = getattr(harness, work)
    ours, theirs = (make(ops.attention, *tensors, backend=backend, **options) for backend in ("fused", "torch"))
    flops *= {"forward": 1, "forward_backward": 3.5}[work]
    moved = {"forward": 4, "forward_backward": 12}[work] * tensors[0].numel() * tensors[0].element_size()
    harness.versus(benchmark, ours, {"torch": theirs}, bytes=moved, flops=flops)


@pytest.mark.quick(work="forward_backward", mask="causal", shape=["4 x 256", "1 x 1024"])
@pytest.mark.long(shape="1 x 4096", work="forward_backward")
@pytest.mark.long(shape="1 x 4096", mask="full")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["16 x 64", "8 x 128", "4 x 256", "1 x 1024", "1 x 4096"])
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_attention(benchmark, work, mask, shape, dtype):
    batch, length = map(int, shape.split(" x "))
    causal = mask == "causal"
    projection = torch.randn(batch, length, 3, HEADS, DIM, dtype=dtype).permute(2, 0, 3, 1, 4)
    tensors = [t.detach().requires_grad_() for t in projection]
    flops = 4 * batch * HEADS * length * length * DIM * (0.5 if causal else 1)
    versus(benchmark, work, tensors, flops, is_causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "length"), [(80, 1024), (128, 1024), (128, 4096)])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
@pytest.mark.long(length=4096)
def test_attention_head_dims(benchmark, work, dim, length, dtype):
    tensors = [torch.randn(1, HEADS, length, dim, dtype=dtype, requires_grad=True) for _ in range(3)]
    versus(benchmark, work, tensors, 2 * HEADS * length * length * dim, is_causal=True)


@pytest.mark.quick(kv_heads=4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [12, 4])
def test_attention_decode(benchmark, kv_heads, dtype):
    """One query over a cache of 1024 keys: bytes of K and V."""
    query = torch.randn(1, HEADS, 1, DIM, dtype=dtype)
    key, value = (torch.randn(1, kv_heads, 1024, DIM, dtype=dtype) for _ in range(2))
    calls = {
        backend: harness.forward(ops.attention, query, key, value, enable_gqa=True, backend=backend)
        for backend in ("fused", "torch")
    }
    harness.versus(
        benchmark, calls.pop("fused"), calls, bytes=2 * key.numel() * key.element_size(), flops=4 * HEADS * 1024 * DIM
    )
