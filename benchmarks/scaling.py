"""Cost against the length T and the vocabulary V, for the fitted exponents, and what the second core brings.

Attention computes T^2 / 2 scores (exponent 2 where the scores dominate), cross_entropy and sample read V logits
(exponent 1). Flops and bytes as in the suites of these operators.
"""

import os

import pytest
import torch

from benchmarks import harness
from benchmarks import sample as sampling
from fastgpt import ops

HEADS, DIM = 12, 64
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
VOCABULARIES = [1024, 4096, 16384, 65536, 131072]
ROWS = 128
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.quick(dtype=torch.bfloat16, work="forward_backward", length=[128, 1024])
@pytest.mark.long(length=4096, work="forward_backward")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_attention(benchmark, work, dtype, length):
    """Query, key and value lie as a training step has them: in one projection of (1, T, 3 H D)."""
    projection = torch.randn(1, length, 3, HEADS, DIM, dtype=dtype).permute(2, 0, 3, 1, 4)
    tensors = [t.detach().requires_grad_() for t in projection]
    make = getattr(harness, work)
    ours, theirs = (make(ops.attention, *tensors, is_causal=True, backend=b) for b in ("fused", "torch"))
    flops = 2 * HEADS * length * length * DIM * {"forward": 1, "forward_backward": 3.5}[work]
    sizes = {"forward": 4, "forward_backward": 12}[work] * tensors[0].numel() * dtype.itemsize
    harness.versus(benchmark, ours, {"torch": theirs}, bytes=sizes, flops=flops, backend="cpu", scale=("T", length))


@pytest.mark.quick(dtype=torch.float32, vocabulary=[4096, 65536])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy(benchmark, dtype, vocabulary):
    logits = torch.randn(ROWS, vocabulary, dtype=dtype, requires_grad=True)
    target = torch.randint(vocabulary, (ROWS,))
    ours, theirs = (harness.forward_backward(ops.cross_entropy, logits, target, backend=b) for b in ("fused", "torch"))
    moved = 3 * logits.numel() * dtype.itemsize
    harness.versus(benchmark, ours, {"torch": theirs}, bytes=moved, backend="cpu", scale=("V", vocabulary))


@pytest.mark.quick(vocabulary=[4096, 65536])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_sample(benchmark, vocabulary):
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    logits = torch.randn(1, vocabulary) * 3
    peers = {"torch by hand": harness.forward(sampling.plain_torch, logits, **options)}
    peers["Hugging Face"] = harness.forward(sampling.hugging_face(options), logits)
    ours = harness.forward(ops.sample, logits, **options)
    harness.versus(benchmark, ours, peers, bytes=4 * vocabulary, backend="cpu", scale=("V", vocabulary))


def _calls(name: str, backend: str) -> harness.Call:
    x = torch.randn(1024, 3072, dtype=torch.bfloat16, requires_grad=True)
    if name == "attention":
        tensors = [torch.randn(1, HEADS, 1024, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        return harness.forward_backward(ops.attention, *tensors, is_causal=True, backend=backend)
    if name == "gelu":
        return harness.forward_backward(ops.gelu, x, "tanh", backend=backend)
    if name == "layer_norm":
        return harness.forward_backward(ops.layer_norm, x, (3072,), backend=backend)
    if name == "cross_entropy":
        return harness.forward_backward(ops.cross_entropy, x, torch.randint(3072, (1024,)), backend=backend)
    if name == "linear_cross_entropy":
        weight = torch.randn(8192, 3072, dtype=torch.bfloat16, requires_grad=True)
        return harness.forward_backward(
            ops.linear_cross_entropy, x, weight, torch.randint(8192, (1024,)), backend=backend
        )
    return harness.forward(ops.gelu, x[:8], "tanh", backend=backend)  # small


@pytest.mark.quick(name=["gelu", "small gelu"])
@pytest.mark.skipif(CORES == 1, reason="there is one core")
@pytest.mark.parametrize(
    "name", ["attention", "layer_norm", "gelu", "cross_entropy", "linear_cross_entropy", "small gelu"]
)
def test_all_cores(benchmark, name):
    """Ours on all cores against ours on one (2 cores: at best 2, never under 1) and torch on all."""
    call = _calls(name, "fused")

    def on_one_thread() -> None:
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(CORES)

    peers = {"ours on one thread": on_one_thread, "torch": _calls(name, "torch")}
    harness.versus(benchmark, call, peers, threads=CORES, dtype=torch.bfloat16, backend="cpu")
