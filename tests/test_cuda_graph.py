"""Every operator on the GPU, forward and backward, eagerly and captured in a CUDA graph that is replayed.

No kernel allocates, synchronises or reads the device from the host, or the capture would fail here.
"""

import pytest
import torch

from fastgpt.cli.doctor import cases
from fastgpt.ops import native

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cuda", "triton"])]

CASES = cases()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(tensors, dtype):
    return {
        name: t.to("cuda", dtype).requires_grad_() if t.is_floating_point() else t.to("cuda")
        for name, t in tensors.items()
    }


def step(case, inputs, backend):
    """The outputs, and the gradients where there are any."""
    result = case.run(backend, **inputs)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    leaves = [t for t in inputs.values() if t.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    gradients = torch.autograd.grad(roots, leaves, [torch.ones_like(t) for t in roots]) if roots else ()
    return [t.detach() for t in (*outputs, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CASES)
def test_eager(op, dtype, backend):
    """What the sanitizer runs: finite results, and the same bits in a second run."""
    if reason := native.missing(backend, op):
        pytest.skip(reason)
    inputs = on_gpu(CASES[op].tensors, dtype)
    first, second = (step(CASES[op], inputs, backend) for _ in range(2))
    torch.cuda.synchronize()
    for a, b in zip(first, second, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CASES)
def test_captured_and_replayed(op, dtype, backend):
    """The graph computes the same bits as eager calls, and follows inputs that change between replays."""
    if reason := native.missing(backend, op):
        pytest.skip(reason)
    case = CASES[op]
    inputs = on_gpu(case.tensors, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up on the side, as torch asks for
        step(case, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, inputs, backend)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for t in inputs.values():
                if t.is_floating_point():
                    t.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, step(case, inputs, backend), strict=True):
            assert torch.equal(a, b)
