"""Owners, strict mode and explain()."""

import io

import pytest
import torch

import fastgpt
from fastgpt.ops import native, registry
from fastgpt.ops.opset import OpSet


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


def layer_norm_on(device, refusal=None, backend=None):
    return registry.resolve("layer_norm", backend, torch.device(device), refusal)


def test_backends_may_refuse_different_things(monkeypatch):
    monkeypatch.setattr(registry, "_OWNERS", {("layer_norm", d): (d, "fast") for d in ("cpu", "cuda")})
    monkeypatch.setattr(registry, "_MISSING", {})
    refusal = {"cpu": "feathers"}
    assert layer_norm_on("cuda", refusal) == "cuda"
    assert layer_norm_on("cpu", refusal) == "reference"
    assert fastgpt.fallbacks()["layer_norm", "feathers"] == 1
    assert layer_norm_on("cpu", refusal, "simt") == "simt"
    with pytest.raises(NotImplementedError, match="backend='cpu' does not take feathers; backend='reference' does"):
        layer_norm_on("cpu", refusal, "cpu")
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match="does not take feathers"):
        layer_norm_on("cpu", refusal)
    with pytest.raises(NotImplementedError, match="backend='cuda' does not take wings"):
        layer_norm_on("cuda", "wings", "cuda")


@pytest.mark.parametrize(
    ("backend", "device"), [("cpu", "cuda:0"), ("simt", "cuda:0"), ("cuda", "cpu"), ("cuda", "meta")]
)
def test_a_backend_takes_tensors_of_its_device_only(backend, device, monkeypatch):
    monkeypatch.setattr(registry, "_MISSING", {})
    with pytest.raises(NotImplementedError, match=rf"layer_norm: backend='{backend}' cannot take tensors on {device}"):
        layer_norm_on(device, None, backend)


def test_what_the_build_lacks_is_owned_by_the_reference(monkeypatch):
    monkeypatch.setattr(registry, "_OWNERS", {})
    monkeypatch.setattr(registry, "_MISSING", {("layer_norm", "cuda"): "no such kernel"})
    registry.owner("layer_norm", "cuda", "cuda", "fast")
    assert registry._OWNERS["layer_norm", "cuda"] == ("reference", "no such kernel")
    assert layer_norm_on("cuda") == "reference"
    assert ("layer_norm", "no such kernel") in fastgpt.fallbacks()
    with pytest.raises(NotImplementedError, match="layer_norm: backend='cuda' is not possible: no such kernel"):
        layer_norm_on("cuda", None, "cuda")
    with pytest.raises(ValueError, match="ops: layer_norm cannot have the backend 'cuda': no such kernel"):
        OpSet({"layer_norm": "cuda"})
    registry.owner("layer_norm", "cpu", "cpu", "fast")
    assert registry._OWNERS["layer_norm", "cpu"] == ("cpu", "fast")


@pytest.mark.parametrize("op", registry.operators())
def test_a_cuda_kernel_owns_its_operator(op):
    if why := native.missing("simt", op):  # compiled from the same sources as CUDA's
        pytest.skip(why)
    assert (op, "cuda") in registry._OWNERS, f"{op} has a CUDA kernel but no registry.owner(..., 'cuda', ...)"
