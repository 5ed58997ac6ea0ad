"""cross_entropy: loss = logsumexp(x) - x[target], with label smoothing (Szegedy et al., 2016) and z-loss (PaLM, 2022).

Shapes: N rows (batch and positions), C classes. With e = label_smoothing and lse = logsumexp(x), a row that counts
gives

    loss = (1 - e) (lse - x[target]) + e (lse - mean(x)) + z_loss lse^2

and a row whose target is ignore_index gives exactly 0, to the loss and to the gradient, whatever its logits hold.

On the CPU the forward of "mean" and "sum", where a gradient is wanted, computes that as well, while each row is in
cache. The backward of a loss that is the last one, so that 1 arrives there, has nothing left to do; any other number is
multiplied into the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as legacy

from fastgpt.ops import checks, native, registry
from fastgpt.ops.losses import (
    check_class_weight,
    check_options,
    check_shapes,
    check_targets,
    fake_loss,
    reduce_rows,
    row_scale,
    unfused_options,
    upfront_scale,
)
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype, with_huge_pages
from fastgpt.ops.numerics import accumulate, as_rows


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Cross entropy of logits and targets, as ``torch.nn.functional.cross_entropy``, with an optional z-loss.

    The fused kernel takes class-index targets without class weights. Class weights and class-probability targets are
    computed by torch itself, and count as a fallback to the reference.

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...); float32, bfloat16, float16 (float64 on the reference).
        target: class indices (int64 or uint8) of shape (), (N,) or (N, d1, ...), each in [0, C) or ``ignore_index``;
            or class probabilities of input's shape.
        weight: (C,) a weight for each class.
        size_average, reduce: deprecated by torch in favour of ``reduction``, which they override with a warning.
        ignore_index: rows with this target count neither in the loss nor in the mean.
        reduction: "none", "mean" (over the rows that count; with class weights the weighted mean) or "sum".
        label_smoothing: in [0, 1]; the share of the target that is spread evenly over all classes.
        z_loss: adds ``z_loss * logsumexp(logits)**2`` to each row that counts, reduced over the same denominator.
        backend: see ``fastgpt.ops``.

    Returns:
        A scalar, or with reduction="none" one loss per target, in input's dtype. The mean over no rows that
        count is NaN, with zero gradients, as in torch.

    Raises:
        IndexError: a target outside [0, C) that is not ``ignore_index``; names the row and the value. On a GPU the
            caller would have to wait for the kernel to learn of it: there the row's loss and gradient are NaN.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy.legacy_get_string(size_average, reduce)
    check_options("cross_entropy", reduction, label_smoothing, z_loss)
    checks.floating("cross_entropy", "input", input)
    probabilities = check_shapes("cross_entropy", input.shape, target)
    checks.same_device("cross_entropy", "target", target, "input", input)
    if probabilities and ignore_index >= 0:
        raise ValueError(
            f"cross_entropy: ignore_index={ignore_index} means nothing to targets that are class probabilities"
        )
    classes = input.shape[min(1, input.dim() - 1)]
    check_class_weight("cross_entropy", weight, input, classes, probabilities)

    unfused = unfused_options(weight, probabilities)
    chosen = registry.resolve("cross_entropy", backend, input.device, unfused or unsupported_dtype(input))
    if chosen == "torch" or unfused:
        return torch_eager(input, target, weight, ignore_index, reduction, label_smoothing, z_loss)
    rows = input.movedim(1, -1).flatten(0, -2) if input.dim() > 2 else input.reshape(-1, input.shape[-1])
    loss, *_ = _op(rows, target.flatten().long(), reduction, ignore_index, label_smoothing, z_loss, chosen)
    if reduction != "none":
        return loss
    return loss.reshape(() if input.dim() == 1 else target.shape)


def torch_eager(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The same with torch.nn.functional."""
    loss = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if not z_loss:
        return loss
    z = z_loss * input.logsumexp(min(1, input.dim() - 1)).square()
    count: Tensor | int = z.numel()
    if target.shape != input.shape:
        counts = target.reshape(z.shape) != ignore_index
        z = z.where(counts, 0)
        count = counts.sum() if weight is None else weight[target[target != ignore_index].long()].sum()
    if reduction == "none":
        return loss + z
    return loss + (z.sum() if reduction == "sum" else z.sum() / count)


# --- reference ---


def reference(
    x: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, maximum, sum_exp, total) of logits x (N, C) and targets (N,).

    For each row logsumexp(x) = maximum + log(sum_exp). The two are kept apart because logsumexp, once rounded, would
    cost the gradient its accuracy where logits are large. ``total`` is the number of rows that count.
    """
    check_targets("cross_entropy", target, x.shape[1], ignore_index)
    counts = target != ignore_index
    logits = accumulate(x)
    maximum = logits.amax(1)
    sum_exp = (logits - maximum[:, None]).exp().sum(1)
    log_p = logits - maximum[:, None] - sum_exp.log()[:, None]
    loss = -(1 - label_smoothing) * log_p.gather(1, target.where(counts, 0)[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(1)
    loss = loss + z_loss * (maximum + sum_exp.log()).square()
    loss = loss.where(counts, 0)
    total = counts.sum(dtype=loss.dtype)
    if reduction != "none":
        loss = loss.sum() / (total if reduction == "mean" else 1)
    return loss.to(x.dtype), maximum.where(counts, 0), sum_exp.where(counts, 0), total


def reference_backward(
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    total: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """dx. With p = softmax(x) and q = (1 - e) onehot(target) + e / C, the smoothed target:

    dx = g (p (1 + 2 z_loss lse) - q), where g is the gradient that reaches the row's loss.
    """
    counts = (target != ignore_index)[:, None]
    p = (accumulate(x) - maximum[:, None]).exp() / sum_exp[:, None]
    q = F.one_hot(target.where(counts[:, 0], 0), x.shape[1]) * (1 - label_smoothing) + label_smoothing / x.shape[1]
    g = row_scale(dloss, total, reduction).reshape(-1, 1)
    dx = g * (p * (1 + 2 * z_loss * (maximum + sum_exp.log())[:, None]) - q)
    return dx.where(counts, 0).to(x.dtype)


def reference_gradients(
    x: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``reference``'s results, and the gradient dx of the loss."""
    options = (reduction, ignore_index, label_smoothing, z_loss)
    loss, maximum, sum_exp, total = reference(x, target, *options)
    dx = reference_backward(torch.ones_like(loss), x, target, maximum, sum_exp, total, *options)
    return loss, maximum, sum_exp, total, dx


# --- kernels ---


def _native(
    kernels: Kernels,
    x: Tensor,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(kernels, x, target, reduction, ignore_index, label_smoothing, z_loss, None)


def _native_gradients(
    kernels: Kernels,
    x: Tensor,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = with_huge_pages(x.new_empty(x.shape))
    return *_forward(kernels, x, target, reduction, ignore_index, label_smoothing, z_loss, dx), dx


def _forward(
    kernels: Kernels,
    x: Tensor,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    dx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, stride = as_rows(x)
    scale = None if dx is None else upfront_scale(target, ignore_index, reduction)
    target = target.contiguous()
    loss, maximum, sum_exp = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    totals = x.new_zeros(2, dtype=torch.float64)
    try:
        kernels.cross_entropy_forward(
            loss=loss,
            maximum=maximum,
            sum_exp=sum_exp,
            totals=totals,
            dx=dx,
            x=x,
            bias=None,
            target=target,
            rows=x.shape[0],
            cols=x.shape[1],
            x_stride=stride,
            dx_stride=x.shape[1],
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            scale=scale,
            dtype=DTYPES[x.dtype],
        )
    except IndexError:
        check_targets("cross_entropy", target, x.shape[1], ignore_index)  # the same, in words
        raise
    return reduce_rows(loss, totals, reduction).to(x.dtype), maximum, sum_exp, totals[1].float()


def _native_backward(
    kernels: Kernels,
    dloss: Tensor,
    x: Tensor,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    total: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    x, stride = as_rows(x)
    target, scale = target.contiguous(), row_scale(dloss, total, reduction).contiguous()
    dx = with_huge_pages(x.new_empty(x.shape))
    kernels.cross_entropy_backward(
        dx=dx,
        scale=scale,
        maximum=maximum,
        sum_exp=sum_exp,
        x=x,
        bias=None,
        target=target,
        rows=x.shape[0],
        cols=x.shape[1],
        x_stride=stride,
        dx_stride=x.shape[1],
        scale_stride=scale.dim(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        dtype=DTYPES[x.dtype],
    )
    return dx


# --- registration ---


def _fake(
    x: Tensor, target: Tensor, reduction: str, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_loss(x, reduction)


def _fake_gradients(x: Tensor, target: Tensor, reduction: str, *_: Any) -> tuple[Tensor, ...]:
    return *fake_loss(x, reduction), x.new_empty(x.shape)


def _fake_backward(dloss: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Tensor,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.options = (reduction, ignore_index, label_smoothing, z_loss, backend)
        ctx.gradient = None
        # Not for float16, where what is too small before the loss scale has been multiplied would be lost; nor on a
        # GPU, which would be waited for to learn that the factor is 1.
        if backend == "cpu" and reduction != "none" and x.dtype != torch.float16:
            loss, *saved, ctx.gradient = _op_gradients(x, target, *ctx.options)
        else:
            loss, *saved = registry.below_autograd(_op, x, target, *ctx.options)
        ctx.save_for_backward(x, target, *saved)
        ctx.mark_non_differentiable(*saved)
        return (loss, *saved)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        registry.refuse_second_derivative("cross_entropy")
        # The first backward gives the gradient away. One that comes later, through a retained graph, computes it, and
        # so does one with an infinity or NaN, which must not reach the rows that do not count.
        dx, ctx.gradient = ctx.gradient, None
        if dx is None:
            dx = _op_backward(dloss, *ctx.saved_tensors, *ctx.options)
        elif torch.compiler.is_compiling() or type(dloss) is not Tensor:  # a tracer's, without a value
            dx.mul_(dloss)
        elif not math.isfinite(dloss.item()):
            dx = _op_backward(dloss, *ctx.saved_tensors, *ctx.options)
        elif dloss.item() != 1:
            dx.mul_(dloss)
        return dx, None, None, None, None, None, None


_OPTIONS = "str reduction, int ignore_index, float label_smoothing, float z_loss"
_op = registry.define(
    "cross_entropy",
    f"(Tensor x, Tensor target, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _CrossEntropy,
)
_op_gradients = registry.define(
    "cross_entropy_gradients",
    f"(Tensor x, Tensor target, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference_gradients, **native.backends(_native_gradients)},
    _fake_gradients,
)
_op_backward = registry.define(
    "cross_entropy_backward",
    f"(Tensor dloss, Tensor x, Tensor target, Tensor maximum, Tensor sum_exp, Tensor total, {_OPTIONS}) -> Tensor",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
