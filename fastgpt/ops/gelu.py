"""gelu: y = s * Phi(s), or its tanh approximation, with s = input + bias (Hendrycks and Gimpel, 2016).

    none: Phi(s) = (1 + erf(s / sqrt 2)) / 2, the normal distribution
    tanh: Phi(s) ~ (1 + tanh u) / 2 = sigmoid(2 u),  u = sqrt(2 / pi) (s + 0.044715 s^3)

Shapes: input any shape, bias (F,) with F the last dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, memory, native, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate

_CUBIC = 0.044715
_SLOPE = math.sqrt(2 / math.pi)


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Gaussian error linear unit, as ``torch.nn.functional.gelu``, of ``input + bias``.

    The limits hold: gelu(-inf) is 0 (torch gives NaN), gelu(inf) is inf; NaN stays NaN.

    Args:
        input: any shape, float32, bfloat16, float16 (float64 on the reference).
        approximate: "none" (exact) or "tanh".
        bias: (input.shape[-1],), of input's dtype or float32; added without rounding the sum.
        backend: see ``fastgpt.ops``.

    Returns:
        A tensor of input's shape and dtype.
    """
    checks.floating("gelu", "input", input)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate={approximate!r} is unknown; allowed are 'none', 'tanh'")
    checks.like("gelu", "bias", bias, "input", input, float32_too=True)
    checks.shape("gelu", "bias", bias, input.shape[-1:], "input's last dimension")
    if bias is not None and not input.dim():
        raise ValueError("gelu: bias needs an input of at least one dimension, not a scalar")

    chosen = registry.resolve("gelu", backend, input.device, unsupported_dtype(input))
    if chosen == "torch":
        return torch_eager(input, approximate, bias)
    return _op(input, bias, approximate, chosen)


def torch_eager(input: Tensor, approximate: str, bias: Tensor | None) -> Tensor:
    """The same with torch.nn.functional."""
    return F.gelu(input if bias is None else (input + bias).to(input.dtype), approximate=approximate)


# --- reference ---


def _shifted(x: Tensor, bias: Tensor | None) -> Tensor:
    return accumulate(x) if bias is None else accumulate(x) + bias


def reference(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias)."""
    s = _shifted(x, bias)
    if approximate == "tanh":
        phi = torch.sigmoid(2 * _SLOPE * (s + _CUBIC * s**3))
    else:
        phi = torch.special.erfc(-s * math.sqrt(0.5)) / 2  # not 1 + erf, which cancels in the negative tail
    return torch.where(s == -math.inf, 0.0, s * phi).to(x.dtype)


def reference_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """(dx, dbias), with s = x + bias and the derivative gelu'(s):

    none: Phi(s) + s phi(s),  phi(s) = exp(-s^2 / 2) / sqrt(2 pi)
    tanh: p + s p (1 - p) z'(s),  p = sigmoid(z), z = 2 u(s), z' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 s^2)
    """
    s = _shifted(x, bias).clamp(-100, 100)  # constant beyond; keeps inf * 0 out
    if approximate == "tanh":
        z = 2 * _SLOPE * (s + _CUBIC * s**3)
        p, rest = torch.sigmoid(z), torch.sigmoid(-z)  # rest = 1 - p, without the cancellation
        derivative = p + s * p * rest * (2 * _SLOPE * (1 + 3 * _CUBIC * s.square()))
    else:
        density = torch.exp(-s.square() / 2) * math.sqrt(0.5 / math.pi)
        derivative = torch.special.erfc(-s * math.sqrt(0.5)) / 2 + s * density
    dx = accumulate(dy) * derivative
    if bias is None:
        return dx.to(x.dtype), x.new_empty(0)
    rows = tuple(range(x.dim() - 1))  # sum(()) would sum over everything
    return dx.to(x.dtype), (dx.sum(rows) if rows else dx).to(bias.dtype)


# --- kernels ---


def _native(kernels: Kernels, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = memory.empty(x.shape, x)
    if x.numel():
        cols = x.numel() if bias is None else x.shape[-1]
        kernels.gelu_forward(
            y=y,
            x=x,
            bias=bias,
            rows=x.numel() // cols,
            cols=cols,
            tanh=approximate == "tanh",
            dtype=DTYPES[x.dtype],
            bias_dtype=DTYPES[x.dtype if bias is None else bias.dtype],
        )
    return y


def _native_backward(
    kernels: Kernels, dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return reference_backward(dy, x, bias, approximate)
    x, dy = x.contiguous(), dy.contiguous()
    bias = None if bias is None else bias.contiguous()
    dx = memory.empty(x.shape, x)
    dbias = x.new_empty(0) if bias is None else torch.empty_like(bias)
    cols = x.numel() if bias is None else x.shape[-1]
    kernels.gelu_backward(
        dx=dx,
        dbias=None if bias is None else dbias,
        dy=dy,
        x=x,
        bias=bias,
        rows=x.numel() // cols,
        cols=cols,
        tanh=approximate == "tanh",
        dtype=DTYPES[x.dtype],
        bias_dtype=DTYPES[x.dtype if bias is None else bias.dtype],
    )
    return dx, dbias


# --- registration ---


def _fake(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.backend = approximate, backend
        return registry.below_autograd(_op, x, bias, approximate, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = _op_backward(dy, x, bias, ctx.approximate, ctx.backend)
        return dx, None if bias is None else dbias, None, None


_op = registry.define(
    "gelu",
    "(Tensor x, Tensor? bias, str approximate) -> Tensor",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _GELU,
)
_op_backward = registry.define(
    "gelu_backward",
    "(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
