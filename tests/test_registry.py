"""Owners, strict mode and explain()."""

import io

import pytest
import torch

import fastgpt
from fastgpt.ops import native, registry


@pytest.mark.parametrize("op", registry.operators())
def test_cpu_kernels_own_every_operator(op):
    backend, reason = registry._OWNERS[op, "cpu"]
    assert backend == "cpu"
    assert reason


def test_explain_names_owner_and_reason():
    out = io.StringIO()
    fastgpt.explain(out)
    text = out.getvalue()
    for op in registry.operators():
        name = f"{op:{max(map(len, registry.operators()))}}"
        assert f"{name}  cpu  -> cpu: " in text
        assert f"{name}  cuda -> {'cuda' if native.has_kernel('cuda', op) else 'reference'}: " in text
    for backend in ("reference", "torch", "simt", "triton"):
        assert f"  {backend}: " in text


def test_explain_shows_fallbacks():
    fastgpt.ops.layer_norm(torch.ones(2, 4, dtype=torch.float64), (4,))
    out = io.StringIO()
    fastgpt.explain(out)
    assert "Fallbacks to the reference in this process:" in out.getvalue()
    assert "layer_norm:" in out.getvalue()


def test_device_without_kernels_goes_to_the_reference_openly():
    x = torch.ones(2, 4, device="meta")
    fastgpt.ops.layer_norm(x, (4,))
    assert ("layer_norm", "no fused kernel for device type meta") in fastgpt.fallbacks()
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match="device type meta"):
        fastgpt.ops.layer_norm(x, (4,))
    with pytest.raises(NotImplementedError, match="backend='cpu' cannot take tensors on meta"):
        fastgpt.ops.layer_norm(x, (4,), backend="cpu")


def test_strict_restores_what_was_before():
    fastgpt.set_strict(True)
    try:
        with fastgpt.strict(False):
            fastgpt.ops.layer_norm(torch.ones(2, 4, dtype=torch.float64), (4,))
        with pytest.raises(fastgpt.FallbackError):
            fastgpt.ops.layer_norm(torch.ones(2, 4, dtype=torch.float64), (4,))
    finally:
        fastgpt.set_strict(False)
