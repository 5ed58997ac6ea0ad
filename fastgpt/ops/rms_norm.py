"""rms_norm: y = s / sqrt(mean(s^2) + eps) * weight, with s = input + residual (Zhang and Sennrich, 2019).

Shapes: N rows (all leading dimensions), C elements a row (the product of normalized_shape).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, memory, native, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation over the last dimensions, as ``torch.nn.functional.rms_norm``.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 (float64 on the reference).
        normalized_shape: the trailing shape to normalise over.
        weight: normalized_shape, of input's dtype or float32.
        eps: added to the mean square. None is what torch takes: the machine epsilon of the dtype that it computes in,
            2^-52 for float64 and 2^-23 for all others (torch's text says input's dtype; its code does not).
        residual: of input's shape and dtype; ``input + residual`` is what gets normalised.
        backend: see ``fastgpt.ops``.

    Returns:
        The normalised tensor; with ``residual`` the pair (normalised, input + residual).
    """
    checks.floating("rms_norm", "input", input)
    normalized_shape = checks.normalized_shape("rms_norm", normalized_shape, input)
    checks.like("rms_norm", "weight", weight, "input", input, float32_too=True)
    checks.shape("rms_norm", "weight", weight, normalized_shape, "normalized_shape")
    checks.like("rms_norm", "residual", residual, "input", input)
    checks.shape("rms_norm", "residual", residual, input.shape, "input's shape")
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps

    chosen = registry.resolve("rms_norm", backend, input.device, unsupported_dtype(input))
    if chosen == "torch":
        return torch_eager(input, normalized_shape, weight, eps, residual)
    y, sum, _ = _op(input, residual, weight, len(normalized_shape), eps, chosen)
    return y if residual is None else (y, sum)


def torch_eager(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with torch.nn.functional."""
    sum = input if residual is None else input + residual
    y = F.rms_norm(sum, list(normalized_shape), weight, eps)
    return y if residual is None else (y, sum)


# --- reference ---


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sum, rstd); rstd = 1 / sqrt(mean square + eps) has shape x.shape[:-dims] and the dtype of accumulation."""
    over = tuple(range(-dims, 0))
    sum = x if residual is None else x + residual
    s = accumulate(sum)
    rstd = (s.square().mean(over, keepdim=True) + eps).rsqrt()
    y = s * rstd
    if weight is not None:
        y = y * weight
    return y.to(x.dtype), x.new_empty(0) if residual is None else sum, rstd.reshape(x.shape[: x.dim() - dims])


def reference_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) with x the normalised input. With xhat = x * rstd and g = dy * weight:

    dx = rstd * (g - xhat * mean(g * xhat)) + dsum,  dweight = sum of dy * xhat over rows.
    """
    over, rows = tuple(range(-dims, 0)), tuple(range(x.dim() - dims))
    scale = rstd.reshape(rstd.shape + (1,) * dims)
    d = accumulate(dy)
    xhat = accumulate(x) * scale
    g = d if weight is None else d * weight
    dx = scale * (g - xhat * (g * xhat).mean(over, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    if weight is None:
        return dx.to(x.dtype), x.new_empty(0)
    # sum(()) would sum over everything; a single row has nothing to sum over.
    dweight = (d * xhat).sum(rows) if rows else d * xhat
    return dx.to(x.dtype), dweight.to(weight.dtype)


# --- kernels ---


def _native(
    kernels: Kernels, x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    y = memory.empty(x.shape, x)
    sum = x.new_empty(0) if residual is None else memory.empty(x.shape, x)
    rstd = x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float32)
    if x.numel():
        kernels.rms_norm_forward(
            y=y,
            sum=None if residual is None else sum,
            rstd=rstd,
            x=x,
            residual=residual,
            weight=weight,
            rows=rstd.numel(),
            cols=x.numel() // rstd.numel(),
            eps=eps,
            dtype=DTYPES[x.dtype],
            weight_dtype=DTYPES[x.dtype if weight is None else weight.dtype],
        )
    return y, sum, rstd


def _native_backward(
    kernels: Kernels, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return reference_backward(dy, dsum, x, weight, rstd, dims)
    x, dy = x.contiguous(), dy.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    weight = None if weight is None else weight.contiguous()
    dx = memory.empty(x.shape, x)
    dweight = x.new_empty(0) if weight is None else torch.empty_like(weight)
    kernels.rms_norm_backward(
        dx=dx,
        dweight=None if weight is None else dweight,
        dy=dy,
        dsum=dsum,
        x=x,
        weight=weight,
        rstd=rstd,
        rows=rstd.numel(),
        cols=x.numel() // rstd.numel(),
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[x.dtype if weight is None else weight.dtype],
    )
    return dx, dweight


# --- registration ---


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else x.new_empty(x.shape), rstd


def _fake_backward(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor, dims: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        dims: int,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, sum, rstd = registry.below_autograd(_op, x, residual, weight, dims, eps, backend)
        ctx.save_for_backward(x if residual is None else sum, weight, rstd)
        ctx.residual, ctx.dims, ctx.backend = residual is not None, dims, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        return y, sum, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        registry.refuse_second_derivative("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            dy = torch.zeros_like(x)
        if not ctx.residual:  # the sum is a placeholder, and so is its gradient
            dsum = None
        dx, dweight = _op_backward(dy, dsum, x, weight, rstd, ctx.dims, ctx.backend)
        return dx, dx if ctx.residual else None, None if weight is None else dweight, None, None, None


_op = registry.define(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, int dims, float eps) -> (Tensor, Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _RMSNorm,
)
_op_backward = registry.define(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor rstd, int dims) -> (Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
