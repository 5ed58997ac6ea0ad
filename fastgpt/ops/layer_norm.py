"""layer_norm: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = input + residual (Ba et al., 2016).

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
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimensions, as ``torch.nn.functional.layer_norm``.

    Args:
        input: (..., *normalized_shape), float32, bfloat16, float16 (float64 on the reference).
        normalized_shape: the trailing shape to normalise over.
        weight, bias: normalized_shape, of input's dtype or float32.
        eps: added to the variance.
        residual: of input's shape and dtype; ``input + residual`` is what gets normalised.
        backend: see ``fastgpt.ops``.

    Returns:
        The normalised tensor; with ``residual`` the pair (normalised, input + residual).
    """
    checks.floating("layer_norm", "input", input)
    normalized_shape = checks.normalized_shape("layer_norm", normalized_shape, input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        checks.like("layer_norm", name, tensor, "input", input, float32_too=True)
        checks.shape("layer_norm", name, tensor, normalized_shape, "normalized_shape")
    if weight is not None and bias is not None:
        checks.like("layer_norm", "bias", bias, "weight", weight)
    checks.like("layer_norm", "residual", residual, "input", input)
    checks.shape("layer_norm", "residual", residual, input.shape, "input's shape")

    chosen = registry.resolve("layer_norm", backend, input.device, unsupported_dtype(input))
    if chosen == "torch":
        return torch_eager(input, normalized_shape, weight, bias, eps, residual)
    y, sum, _, _ = _op(input, residual, weight, bias, len(normalized_shape), eps, chosen)
    return y if residual is None else (y, sum)


def torch_eager(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with torch.nn.functional."""
    sum = input if residual is None else input + residual
    y = F.layer_norm(sum, list(normalized_shape), weight, bias, eps)
    return y if residual is None else (y, sum)


# --- reference ---


def reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd); mean and rstd have shape x.shape[:-dims] and the dtype of accumulation."""
    over = tuple(range(-dims, 0))
    sum = x if residual is None else x + residual
    s = accumulate(sum)
    mean = s.mean(over, keepdim=True)
    centred = s - mean
    rstd = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    y = centred * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    rows = x.shape[: x.dim() - dims]
    return y.to(x.dtype), x.new_empty(0) if residual is None else sum, mean.reshape(rows), rstd.reshape(rows)


def reference_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) with x the normalised input. With xhat = (x - mean) * rstd and g = dy * weight:

    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  dweight = sum of dy * xhat,  dbias = sum of dy over rows.
    """
    over, rows = tuple(range(-dims, 0)), tuple(range(x.dim() - dims))
    shape = mean.shape + (1,) * dims
    d = accumulate(dy)
    xhat = (accumulate(x) - mean.reshape(shape)) * rstd.reshape(shape)
    g = d if weight is None else d * weight
    dx = rstd.reshape(shape) * (g - g.mean(over, keepdim=True) - xhat * (g * xhat).mean(over, keepdim=True))
    if dsum is not None:
        dx = dx + dsum
    none = x.new_empty(0)
    dtype = x.dtype if weight is None else weight.dtype
    # sum(()) would sum over everything; a single row has nothing to sum over.
    dweight = none if weight is None else ((d * xhat).sum(rows) if rows else d * xhat).to(dtype)
    dbias = (d.sum(rows) if rows else d).to(dtype) if bias else none
    return dx.to(x.dtype), dweight, dbias


# --- kernels ---


def _native(
    kernels: Kernels,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = x.shape[: x.dim() - dims]
    y = memory.empty(x.shape, x)
    sum = x.new_empty(0) if residual is None else memory.empty(x.shape, x)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        affine = weight if weight is not None else bias
        kernels.layer_norm_forward(
            y=y,
            sum=None if residual is None else sum,
            mean=mean,
            rstd=rstd,
            x=x,
            residual=residual,
            weight=weight,
            bias=bias,
            rows=mean.numel(),
            cols=x.numel() // mean.numel(),
            eps=eps,
            dtype=DTYPES[x.dtype],
            weight_dtype=DTYPES[x.dtype if affine is None else affine.dtype],
        )
    return y, sum, mean, rstd


def _native_backward(
    kernels: Kernels,
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return reference_backward(dy, dsum, x, weight, mean, rstd, bias, dims)
    x, dy = x.contiguous(), dy.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    weight = None if weight is None else weight.contiguous()
    shape = x.shape[x.dim() - dims :]
    dx = memory.empty(x.shape, x)
    none = x.new_empty(0)
    dtype = x.dtype if weight is None else weight.dtype
    dweight = none if weight is None else x.new_empty(shape, dtype=dtype)
    dbias = x.new_empty(shape, dtype=dtype) if bias else none
    kernels.layer_norm_backward(
        dx=dx,
        dweight=None if weight is None else dweight,
        dbias=dbias if bias else None,
        dy=dy,
        dsum=dsum,
        x=x,
        weight=weight,
        mean=mean,
        rstd=rstd,
        rows=mean.numel(),
        cols=x.numel() // mean.numel(),
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[dtype],
    )
    return dx, dweight, dbias


# --- registration ---


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[: x.dim() - dims], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = x.new_empty(x.shape)
    return y, x.new_empty(0) if residual is None else x.new_empty(x.shape), mean, torch.empty_like(mean)


def _fake_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[x.dim() - dims :]
    dtype = x.dtype if weight is None else weight.dtype
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape),
        none if weight is None else x.new_empty(shape, dtype=dtype),
        x.new_empty(shape, dtype=dtype) if bias else none,
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        dims: int,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, sum, mean, rstd = registry.below_autograd(_op, x, residual, weight, bias, dims, eps, backend)
        ctx.save_for_backward(x if residual is None else sum, weight, mean, rstd)
        ctx.residual, ctx.bias, ctx.dims, ctx.backend = residual is not None, bias is not None, dims, backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        return y, sum, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        registry.refuse_second_derivative("layer_norm")
        x, weight, mean, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            dy = torch.zeros_like(x)
        if not ctx.residual:  # the sum is a placeholder, and so is its gradient
            dsum = None
        dx, dweight, dbias = _op_backward(dy, dsum, x, weight, mean, rstd, ctx.bias, ctx.dims, ctx.backend)
        return (
            dx,
            dx if ctx.residual else None,
            None if weight is None else dweight,
            dbias if ctx.bias else None,
            None,
            None,
            None,
        )


_op = registry.define(
    "layer_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _LayerNorm,
)
_op_backward = registry.define(
    "layer_norm_backward",
    "(Tensor dy, Tensor? dsum, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool bias, int dims)"
    " -> (Tensor, Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
