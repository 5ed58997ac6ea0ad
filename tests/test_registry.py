"""Owners, strict mode and explain()."""

import io

import pytest
import torch

import fastgpt
from fastgpt.ops import native, owners, registry
from fastgpt.ops.opset import OpSet
from fastgpt.ops.owners import Place


@pytest.mark.parametrize("op", registry.operators())
def test_every_operator_has_an_owner_and_a_reason_everywhere(op):
    assert registry.owner_on(op, Place("cpu")).backend == "cpu"
    for place in (Place("cpu"), Place("cuda"), *(Place("cuda", (major, 0)) for major in (8, 9, 10, 12)), Place("rocm")):
        for dtype in (torch.float32, torch.bfloat16):
            assert all(reason for _, reason in owners.owners(op, place, dtype))


def test_the_table_is_of_the_public_operators():
    public = {name for name in fastgpt.ops.__all__ if hasattr(torch.ops.fastgpt, name)}
    assert public - {"grad_norm"} == set(owners.TABLE)  # grad_norm goes with adamw


@pytest.mark.parametrize(
    ("op", "capability", "dtype", "order"),
    [
        ("attention", (8, 0), torch.bfloat16, ["cuda", "triton"]),
        ("attention", (9, 0), torch.bfloat16, ["triton", "cuda"]),
        ("attention", (9, 0), torch.float16, ["triton", "cuda"]),
        ("attention", (9, 0), torch.float32, ["cuda", "triton"]),
        ("attention", (10, 3), torch.bfloat16, ["triton", "cuda"]),
        ("attention", (12, 0), torch.bfloat16, ["cuda", "triton"]),
        ("attention_varlen", (10, 0), torch.bfloat16, ["triton", "cuda"]),
        ("attention_with_kvcache", (9, 0), torch.bfloat16, ["cuda", "triton"]),
        ("layer_norm", (9, 0), torch.bfloat16, ["cuda", "triton"]),
    ],
)
def test_owners_by_architecture(op, capability, dtype, order, monkeypatch):
    place = Place("cuda", capability)
    assert [backend for backend, _ in owners.owners(op, place, dtype)] == order
    monkeypatch.setattr(owners, "place", lambda device: place)
    monkeypatch.setattr(registry, "_MISSING", {})
    device = torch.device("cuda:0")
    assert registry.resolve(op, None, device, None, dtype) == order[0]
    assert registry.resolve(op, None, device, {order[0]: "feathers"}, dtype) == order[1]
    monkeypatch.setattr(registry, "_MISSING", {(op, order[0]): "no such kernel"})
    assert registry.resolve(op, None, device, None, dtype) == order[1]
    assert registry.owner_on(op, place, dtype).reason.startswith("no such kernel; ")


def test_rocm_has_triton_alone(monkeypatch):
    monkeypatch.setattr(owners, "place", lambda device: Place("rocm"))
    monkeypatch.setattr(registry, "_MISSING", {})
    assert registry.resolve("gelu", None, torch.device("cuda:0"), None) == "triton"
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match="does not take feathers"):
        registry.resolve("gelu", None, torch.device("cuda:0"), "feathers")


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(owners, "_places", {})
    devices = [torch.device(d) for d in ("cuda", "cuda:1", "cuda:0", "cuda:0", "cpu")]
    with monkeypatch.context() as gpus:
        gpus.setattr(torch.cuda, "is_available", lambda: True)
        gpus.setattr(torch.cuda, "current_device", lambda: 1)
        gpus.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, index))
        assert [owners.place(d).capability for d in devices] == [(9, 1), (9, 1), (9, 0), (9, 0), (0, 0)]
    assert asked == [1, 0]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def by_place(x):
        return x + owners.place(devices[1]).capability[0]

    assert by_place(torch.ones(())) == 10


def test_explain_names_owner_and_reason():
    out = io.StringIO()
    fastgpt.explain(out)
    text = out.getvalue()
    for op in registry.operators():
        name = f"{op:{max(map(len, registry.operators()))}}"
        assert f"{name}  cpu  -> cpu: " in text
        owner = next((b for b in ("cuda", "triton") if native.has_kernel(b, op)), "reference")
        assert f"{name}  cuda -> {owner}: " in text
    owner = next((b for b in ("triton", "cuda") if native.has_kernel(b, "attention")), "reference")
    assert f"cuda, 16 bits on sm_90, sm_100 -> {owner}: " in text
    for backend in ("reference", "torch", "simt", "triton"):
        assert f"  {backend}: " in text


def test_explain_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(registry, "_MISSING", {("attention", "triton"): "Triton is not installed"})
    where, backend, reason = registry.table("attention")[2]
    assert (where, backend) == ("cuda, 16 bits on sm_90, sm_100", "cuda")
    assert reason.startswith("Triton is not installed; ")


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
    lacking = {("layer_norm", backend): f"no {backend} kernel" for backend in ("cuda", "triton")}
    monkeypatch.setattr(registry, "_MISSING", lacking)
    assert registry.owner_on("layer_norm", Place("cuda")) == ("reference", "no cuda kernel; no triton kernel")
    assert layer_norm_on("cuda") == "reference"
    assert ("layer_norm", "no cuda kernel") in fastgpt.fallbacks()
    with pytest.raises(NotImplementedError, match="layer_norm: backend='cuda' is not possible: no cuda kernel"):
        layer_norm_on("cuda", None, "cuda")
    with pytest.raises(ValueError, match="ops: layer_norm cannot have the backend 'cuda': no cuda kernel"):
        OpSet({"layer_norm": "cuda"})
