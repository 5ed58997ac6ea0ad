"""Attention's tiles by tensor descriptors (sm_90 and later) and by pointers: when which, and the same bits."""

import importlib

import pytest
import torch

from fastgpt.ops import native
from tests.ops import harness
from tests.ops.harness import ops

if native.NO_TRITON:
    pytest.skip(native.NO_TRITON, allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import launch
from fastgpt.kernels.compile import target_of

TRITON = [backend for backend in harness.backends("attention") if backend == "triton"]
HALVES = [torch.float16, torch.bfloat16]
USERS = [importlib.import_module(f"fastgpt.kernels.attention_{name}") for name in ("forward", "backward")]
EVERYTHING = {"window": (60, 3), "softcap": 5.0, "dropout_p": 0.2}


def inputs(shape, dtype, seed=0):
    """(B, T, H, D) projections, as a model has them, seen as (B, H, T, D)."""
    b, hq, h, length, keys, e, ev = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, length, hq, e), (b, keys, h, e), (b, keys, h, ev), (b, length, hq, ev))
    return [torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for size in sizes]


def results(tensors, backend, **options):
    """Output and gradients."""
    q, k, v, dout = tensors
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.manual_seed(1)  # of dropout
    out = ops.attention(*leaves, enable_gqa=True, backend=backend, **options)
    return [out, *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 2, 70, 70, 64, 64), {"is_causal": True}),
        ((2, 2, 1, 40, 150, 128, 128), {}),  # grouped; the keys end within a tile
        ((1, 1, 1, 100, 90, 80, 40), {"window": (20, 7)}),  # head dims that do not fill their tiles
        ((1, 2, 2, 65, 130, 64, 64), EVERYTHING),
    ],
    ids=["causal", "grouped", "window", "everything"],
)
def test_the_same_bits(shape, options, dtype, backend, monkeypatch):
    # One architecture's tiles, because their sizes decide the order of sums; where these run does not matter.
    monkeypatch.setattr(launch, "_target", lambda: target_of("sm_80"))
    tensors = inputs(shape, dtype)
    found = []
    for has in (False, True):
        for module in USERS:
            monkeypatch.setattr(module, "has_copy_engine", lambda target, has=has: has)
        found.append(results(tensors, backend, **options))
    for pointers, descriptors in zip(*found, strict=True):
        assert torch.equal(pointers, descriptors)


def described(architecture, q, k, v, **options):
    """kernel -> whether its tiles come by descriptors on an architecture, in every configuration."""
    with native.triton_on_cpu(), launch.recording() as launches:
        out = ops.attention(q, k, v, backend="triton", **options)
        if out.requires_grad:
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    found = {}
    for call in launches:
        for config in call.configs(target_of(architecture)):
            descriptors = [arg for arg in call.args_with(config) if isinstance(arg, TensorDescriptor)]
            assert bool(descriptors) == config.kwargs.get("TMA", False)
            found.setdefault(call.kernel.__name__, set()).add(bool(descriptors))
    return found


def heads(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("architecture", "wanted"),
    [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True), ("sm_120", True)],
)
def test_where_the_architecture_has_them(architecture, wanted):
    q, k, v = (heads(2, 4, 128, 64) for _ in range(3))
    assert described(architecture, q, k, v, is_causal=True) == {"attention_forward_kernel": {wanted}}


def test_not_on_amd():
    q, k, v = (heads(2, 4, 128, 64) for _ in range(3))
    assert described("gfx942", q, k, v) == {"attention_forward_kernel": {False}}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t, True),
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), True),
        (lambda t: t[..., :40], True),  # 80 bytes of every 128
        (lambda t: t[:, :, 3:], True),
        (lambda t: t[:1, :1].expand_as(t), False),  # a stride of zero
        (lambda t: t[..., :35], True),  # only strides count
        (lambda t: heads(2, 4, 128, 68)[..., :64], False),  # strides that are no multiple of 16 bytes
        (lambda t: heads(2 * 4 * 128 * 64 + 4)[4:].view(t.shape), False),  # it begins elsewhere
        (lambda t: t.float(), False),
    ],
    ids=["dense", "view", "narrow", "later rows", "expanded", "odd width", "odd stride", "misaligned", "float32"],
)
def test_which_keys_and_values(change, wanted):
    q = change(heads(2, 4, 128, 64))
    k, v = (change(heads(2, 4, 128, 64)) for _ in range(2))
    assert described("sm_90", q, k, v) == {"attention_forward_kernel": {wanted}}


def test_tuned_apart(monkeypatch):
    """What was timed with descriptors is no answer for tensors that have none."""
    classes = []
    for module in USERS:
        monkeypatch.setattr(module, "launch", lambda *args, shape_class=(), **options: classes.append(shape_class))
    with native.triton_on_cpu():
        for width in (64, 68):
            q, k, v = (heads(2, 4, 128, width)[..., :64].requires_grad_() for _ in range(3))
            out = ops.attention(q, k, v, backend="triton")
            torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    forward, _, of_keys, of_queries = zip(classes[:4], classes[4:], strict=True)
    assert all(one != other for one, other in (forward, of_keys, of_queries))
