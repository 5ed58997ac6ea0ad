"""swiglu: y = silu(gate) * up = gate * sigmoid(gate) * up (Shazeer, "GLU Variants Improve Transformer", 2020).

Shapes: gate and up (..., F); packed, gate is (..., 2F): [gate, up] halves of one projection.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, memory, native, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate, as_rows


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``silu(gate) * up``, in one pass.

    The limits hold: silu(-inf) is 0 (torch gives NaN); NaN stays NaN.

    Args:
        gate: (..., F), float32, bfloat16, float16 (float64 on the reference); or (..., 2F) when ``up`` is None.
        up: of gate's shape and dtype. None: gate's last dimension holds [gate, up], and its gradient is one tensor.
            Slices of a fused projection's last dimension are read in place.
        backend: see ``fastgpt.ops``.

    Returns:
        (..., F), in gate's dtype.
    """
    checks.floating("swiglu", "gate", gate)
    checks.like("swiglu", "up", up, "gate", gate)
    checks.shape("swiglu", "up", up, gate.shape, "gate's shape")
    if up is None and (not gate.dim() or gate.shape[-1] % 2):
        raise ValueError(
            f"swiglu: gate has shape {tuple(gate.shape)}; without up its last dimension must hold [gate, up], "
            "an even number of elements"
        )

    chosen = registry.resolve("swiglu", backend, gate.device, unsupported_dtype(gate))
    if chosen == "torch":
        return torch_eager(gate, up)
    return _op(gate, up, chosen)


def torch_eager(gate: Tensor, up: Tensor | None) -> Tensor:
    """The same with torch.nn.functional."""
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    half = gate.shape[-1] // 2
    return gate[..., :half], gate[..., half:]


# --- reference ---


def reference(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up."""
    g, u = (accumulate(t) for t in _halves(gate, up))
    silu = torch.where(g == -math.inf, 0.0, g * torch.sigmoid(g))
    return (silu * u).to(gate.dtype)


def reference_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dgate, dup), or packed as (dgate of gate's shape, empty). With s = sigmoid(gate):

    dup = dy * gate * s,  dgate = dy * up * s * (1 + gate * (1 - s))
    """
    g, u = (accumulate(t) for t in _halves(gate, up))
    d, s = accumulate(dy), torch.sigmoid(g)
    dup = d * torch.where(g == -math.inf, 0.0, g * s)
    dgate = d * u * s * (1 + g.clamp(-100, 100) * torch.sigmoid(-g))  # the clamp keeps inf * 0 out
    if up is None:
        return torch.cat([dgate, dup], -1).to(gate.dtype), gate.new_empty(0)
    return dgate.to(gate.dtype), dup.to(gate.dtype)


# --- kernels ---


def _strided_halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor, int, int]:
    """(gate, up, elements between rows of each) as the kernel reads them; keep the tensors alive during the call."""
    if gate.dim() == 0:
        assert up is not None
        gate, up = gate.reshape(1), up.reshape(1)
    gate, gate_stride = as_rows(gate)
    if up is None:
        gate, up = _halves(gate, None)
        return gate, up, gate_stride, gate_stride
    up, up_stride = as_rows(up)
    return gate, up, gate_stride, up_stride


def _native(kernels: Kernels, gate: Tensor, up: Tensor | None) -> Tensor:
    g, u, gate_stride, up_stride = _strided_halves(gate, up)
    y = memory.empty(g.shape if gate.dim() else (), gate)
    if y.numel():
        kernels.swiglu_forward(
            y=y,
            gate=g,
            up=u,
            rows=y.numel() // g.shape[-1],
            cols=g.shape[-1],
            gate_stride=gate_stride,
            up_stride=up_stride,
            dtype=DTYPES[gate.dtype],
        )
    return y


def _native_backward(kernels: Kernels, dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    dy = dy.contiguous()
    g, u, gate_stride, up_stride = _strided_halves(gate, up)
    dgate = memory.empty(gate.shape, gate)
    dup = memory.empty((0,) if up is None else up.shape, gate)
    if dy.numel():
        cols = g.shape[-1]
        into_gate, into_up = _halves(dgate, None if up is None else dup)
        kernels.swiglu_backward(
            dgate=into_gate,
            dup=into_up,
            dy=dy,
            gate=g,
            up=u,
            rows=dy.numel() // cols,
            cols=cols,
            gate_stride=gate_stride,
            up_stride=up_stride,
            gradient_stride=2 * cols if up is None else cols,
            dtype=DTYPES[gate.dtype],
        )
    return dgate, dup


# --- registration ---


def _fake(gate: Tensor, up: Tensor | None) -> Tensor:
    return gate.new_empty(_halves(gate, up)[0].shape)


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return registry.below_autograd(_op, gate, up, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup = _op_backward(dy, gate, up, ctx.backend)
        return dgate, None if up is None else dup, None


_op = registry.define(
    "swiglu",
    "(Tensor gate, Tensor? up) -> Tensor",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _SwiGLU,
)
_op_backward = registry.define(
    "swiglu_backward",
    "(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
