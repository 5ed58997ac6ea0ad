"""linear_cross_entropy: cross_entropy(input @ linear_weight.T + linear_bias, target), without the logits in memory.

Shapes: N rows (batch and positions), K input features, C classes. The N x C logits exist one chunk of rows at a time
(the idea of Liger Kernel, 2024, and Cut Cross-Entropy, 2024). Which path does what:

- no gradient wanted: each chunk of logits is reduced to its rows' losses and dropped;
- "mean" and "sum": the gradient of every row's loss is known up to the one factor that arrives in the backward, so the
  forward turns each chunk into its gradient in place and sums dinput, dlinear_weight and dlinear_bias then and there
  (three GEMMs, as without chunks). The backward multiplies them by that factor;
- "none", or a second backward through a retained graph: each row has a factor of its own, so the backward computes
  the chunks again from the saved maximum and sum_exp of each row (a fourth GEMM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, native, registry
from fastgpt.ops.cross_entropy import reference as cross_entropy_reference
from fastgpt.ops.cross_entropy import reference_backward as cross_entropy_reference_backward
from fastgpt.ops.cross_entropy import torch_eager as cross_entropy_torch_eager
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
from fastgpt.ops.numerics import accumulate


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The cross entropy of a linear layer's output, as ``torch.nn.functional.linear_cross_entropy`` (torch >= 2.13).

    The fused kernel takes a (C, in_features) ``linear_weight`` and class-index targets without class weights. What else
    torch's function takes is computed by torch itself, and counts as a fallback to the reference.

    Args:
        input: (in_features,) or (N, in_features); also (..., in_features) where target is (...).
            float32, bfloat16, float16 (float64 on the reference).
        linear_weight: (C, in_features), or (C, d1, ..., in_features) for a loss at each of d1 x ... positions.
        target: class indices (int64 or uint8) of shape (), (N,) or (N, d1, ...), each in [0, C) or ``ignore_index``;
            or class probabilities of the logits' shape.
        linear_bias: linear_weight's shape without in_features.
        weight, reduction, label_smoothing, z_loss: as in ``fastgpt.ops.cross_entropy``.
        ignore_index: None is -100. On the CPU the rows it ignores are skipped: they cost nothing.
        options: torch.nn.LinearCrossEntropyOptions, torch's own chunking strategy. It changes no result and is not
            consulted here: the fused kernel always works in chunks, of its own choice.
        backend: see ``fastgpt.ops``.

    Returns:
        A scalar, or with reduction="none" one loss per target, in input's dtype.

    Raises:
        IndexError: a target outside [0, C) that is not ``ignore_index``; names the row and the value. On a GPU the
            row's loss and gradient are NaN instead, as of ``fastgpt.ops.cross_entropy``.
    """
    op = "linear_cross_entropy"
    check_options(op, reduction, label_smoothing, z_loss)
    checks.floating(op, "input", input)
    checks.like(op, "linear_weight", linear_weight, "input", input)
    checks.like(op, "linear_bias", linear_bias, "input", input)
    if options is not None and not isinstance(options, getattr(torch.nn, "LinearCrossEntropyOptions", ())):
        raise TypeError(f"{op}: options must be torch.nn.LinearCrossEntropyOptions, not {type(options).__name__}")
    if linear_weight.dim() < 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{op}: linear_weight has shape {tuple(linear_weight.shape)}; it must be (C, in_features) or "
            f"(C, d1, ..., in_features), with input's last dimension as in_features (input is {tuple(input.shape)})"
        )
    classes, *positions, features = linear_weight.shape
    checks.shape(op, "linear_bias", linear_bias, linear_weight.shape[:-1], "linear_weight's shape without in_features")
    if positions and input.dim() != 2:
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}; with linear_weight of shape {tuple(linear_weight.shape)} "
            f"it must be (N, {features})"
        )
    if input.dim() > 2:
        if not isinstance(target, Tensor) or target.shape != input.shape[:-1]:
            found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"{op}: target is {found}; with input of shape {tuple(input.shape)} it must hold class indices of "
                f"shape {tuple(input.shape[:-1])}"
            )
        logits = torch.Size((target.numel(), classes))
        probabilities = check_shapes(op, logits, target.flatten())
    else:
        logits = torch.Size((*input.shape[:-1], classes, *positions))
        probabilities = check_shapes(op, logits, target)
    checks.same_device(op, "target", target, "input", input)
    check_class_weight(op, weight, input, classes, probabilities)
    if probabilities and ignore_index is not None:
        raise ValueError(f"{op}: ignore_index={ignore_index} means nothing to targets that are class probabilities")
    ignore_index = -100 if ignore_index is None else ignore_index

    unfused = unfused_options(weight, probabilities) or ("linear_weight of more than 2 dimensions" * bool(positions))
    chosen = registry.resolve(op, backend, input.device, unfused or unsupported_dtype(input))
    if chosen == "torch" or unfused:
        return torch_eager(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, z_loss
        )
    rows = input.reshape(-1, features)
    options_of_rows = (reduction, ignore_index, label_smoothing, z_loss, chosen)
    loss, *_ = _op(rows, linear_weight, linear_bias, target.flatten().long(), *options_of_rows)
    return loss.reshape(input.shape[:-1]) if reduction == "none" else loss


def torch_eager(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The same with torch.nn.functional: linear, then cross_entropy."""
    classes, *positions, features = linear_weight.shape
    bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight.reshape(-1, features), bias)
    if input.dim() > 2:
        loss = cross_entropy_torch_eager(
            logits.reshape(-1, classes), target.flatten(), weight, ignore_index, reduction, label_smoothing, z_loss
        )
        return loss.reshape(target.shape) if reduction == "none" else loss
    logits = logits.reshape(*input.shape[:-1], classes, *positions)
    return cross_entropy_torch_eager(logits, target, weight, ignore_index, reduction, label_smoothing, z_loss)


# --- reference ---


def _logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(accumulate(x), accumulate(w), None if b is None else accumulate(b))


def reference(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, maximum, sum_exp, total) for x (N, K), w (C, K), b (C,), targets (N,); see cross_entropy's reference."""
    check_targets("linear_cross_entropy", target, w.shape[0], ignore_index)
    loss, maximum, sum_exp, total = cross_entropy_reference(
        _logits(x, w, b), target, reduction, ignore_index, label_smoothing, z_loss
    )
    return loss.to(x.dtype), maximum, sum_exp, total


def reference_gradients(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``reference``'s results and the gradients (dx, dw, db) of the loss; of those not ``wanted``, an empty tensor."""
    options = (reduction, ignore_index, label_smoothing, z_loss)
    loss, maximum, sum_exp, total = reference(x, w, b, target, *options)
    dx, dw, db = reference_backward(torch.ones_like(loss), x, w, b, target, maximum, sum_exp, total, *options, wanted)
    return loss, maximum, sum_exp, total, dx, dw, db


def reference_backward(
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    total: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """With g = d loss / d logits: dx = g @ w, dw = g.T @ x, db = sum of g over rows."""
    g = cross_entropy_reference_backward(
        dloss,
        _logits(x, w, b),
        target,
        maximum,
        sum_exp,
        total,
        reduction,
        ignore_index,
        label_smoothing,
        z_loss,
    )
    dx, dw, db = _empty_gradients(x, w, b, wanted)
    if wanted[0]:
        dx = (g @ accumulate(w)).to(x.dtype)
    if wanted[1]:
        dw = (g.T @ accumulate(x)).to(w.dtype)
    if wanted[2]:
        db = g.sum(0).to(w.dtype)
    return dx, dw, db


def _empty_gradients(x: Tensor, w: Tensor, b: Tensor | None, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for dx, dw and db; an empty tensor for one that is not wanted."""
    shapes = (x.shape, w.shape, w.shape[:1])
    dx, dw, db = (x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))
    return dx, dw, db


# --- kernels ---

# Logits in memory at a time: 52 MiB of float32, and 256 rows of GPT-2's vocabulary, where GEMMs of either dtype are
# near their best. Less makes them read linear_weight and add to its gradient more often.
CHUNK_ELEMENTS = 13 << 20
# On a GPU more rows: a chunk of 32 MiB reads and writes dw about as long as its GEMMs compute.
CHUNK_BYTES_ON_GPU = 256 << 20
# A GPU's GEMMs are at their best where rows start at multiples of 128 bytes: elements that the logits' rows are padded
# to there.
ROW_ELEMENTS_ON_GPU = 64
# dw in half precision is a sum of one product per chunk, and each addition rounds. So many are added in place, which
# stays within the error budget; the sums of more are added up in float32, at 4 bytes for each element of linear_weight.
CHUNKS_IN_PLACE = 4
# Classes whose part of dw is converted to float32 at a time.
CLASS_BLOCK = 4096


def _chunks(x: Tensor, w: Tensor, padded: bool) -> Iterator[tuple[slice, Tensor]]:
    """The logits x @ w.T, some rows at a time, all in the same memory; rows are ``logits.stride(0)`` apart."""
    rows, stride = chunk_rows(x.shape[0], w), w.shape[0]
    if padded:
        stride = math.ceil(stride / ROW_ELEMENTS_ON_GPU) * ROW_ELEMENTS_ON_GPU
    buffer = with_huge_pages(x.new_empty(rows, stride))[:, : w.shape[0]]
    for start in range(0, x.shape[0], rows or 1):
        chunk = slice(start, min(start + rows, x.shape[0]))
        logits = buffer[: chunk.stop - start]
        torch.mm(x[chunk], w.t(), out=logits)
        yield chunk, logits


def chunk_rows(rows: int, w: Tensor) -> int:
    """Rows in each chunk: as many as its memory allows, evenly spread."""
    elements = CHUNK_BYTES_ON_GPU // w.element_size() if w.is_cuda else CHUNK_ELEMENTS
    most = max(elements // w.shape[0], 1)
    return math.ceil(rows / math.ceil(rows / most)) if rows else 0


class _Gradients:
    """dx, dw and db, added up chunk by chunk from the gradient of the logits."""

    def __init__(self, x: Tensor, w: Tensor, b: Tensor | None, wanted: list[bool]) -> None:
        self.x, self.w, self.wanted = x, w, wanted
        self.dx, self.dw, self.db = (with_huge_pages(t) for t in _empty_gradients(x, w, b, wanted))
        self.chunks, self.added = math.ceil(x.shape[0] / max(chunk_rows(x.shape[0], w), 1)), 0
        self.dw_sum = None
        if not self.chunks:
            self.dw.zero_()
        elif self.chunks > CHUNKS_IN_PLACE and w.dtype != torch.float32:
            self.dw_sum = with_huge_pages(torch.empty_like(self.dw, dtype=torch.float32)).zero_()
        self.db_sum = torch.zeros_like(self.db, dtype=torch.float32)

    def add(self, chunk: slice, g: Tensor) -> None:
        """``g`` is the gradient of the logits of the rows in ``chunk``."""
        if self.wanted[0]:
            torch.mm(g, self.w, out=self.dx[chunk])
        if self.wanted[1]:
            self._add_weight(g.t(), self.x[chunk])
        if self.wanted[2]:
            self.db_sum += g.sum(0, dtype=torch.float32)

    def _add_weight(self, g: Tensor, x: Tensor) -> None:
        if self.added == 0 or (self.dw_sum is not None and self.added % CHUNKS_IN_PLACE == 0):
            torch.mm(g, x, out=self.dw)
        else:
            torch.addmm(self.dw, g, x, out=self.dw)
        self.added += 1
        if self.dw_sum is not None and (self.added % CHUNKS_IN_PLACE == 0 or self.added == self.chunks):
            for part, block in zip(self.dw_sum.split(CLASS_BLOCK), self.dw.split(CLASS_BLOCK), strict=True):
                part += block

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.dw_sum is not None:
            self.dw.copy_(self.dw_sum)
        return self.dx, self.dw, self.db.copy_(self.db_sum)


class _CountingRows:
    """The rows whose target is not ignore_index: the others are left out of every GEMM and put back as zeros.

    ``everything``: no row is left out, since how many there are cannot be known without waiting for a GPU.
    """

    def __init__(self, target: Tensor, ignore_index: int, everything: bool) -> None:
        self.rows, self.index, self.ignored = target.shape[0], None, None
        if everything:
            self.ignored = target == ignore_index
        else:
            index = (target != ignore_index).nonzero()[:, 0]
            self.index = index if index.numel() < self.rows else None

    def inputs(self, x: Tensor) -> Tensor:
        """What the GEMMs take of x (N, K). An ignored row that stays is zero: NaN in it would be NaN in dw."""
        return self.select(x) if self.ignored is None else x.masked_fill(self.ignored[:, None], 0)

    def select(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous() if self.index is None else tensor[self.index]

    def put_back(self, tensor: Tensor) -> Tensor:
        if self.index is None:
            return tensor
        return tensor.new_zeros(self.rows, *tensor.shape[1:]).index_copy_(0, self.index, tensor)


def _run(
    kernels: Kernels,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool] | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
    """(loss, maximum, sum_exp, total), and where gradients are ``wanted``, those of the reduced loss."""
    asynchronous = native.asynchronous(kernels)
    if not asynchronous:
        check_targets("linear_cross_entropy", target, w.shape[0], ignore_index)
    counting = _CountingRows(target, ignore_index, everything=asynchronous)
    x, target, b = counting.inputs(x), counting.select(target), None if b is None else b.contiguous()
    loss, maximum, sum_exp = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    totals = x.new_zeros(2, dtype=torch.float64)
    gradients = None if wanted is None else _Gradients(x, w, b, wanted)
    scale = upfront_scale(target, ignore_index, reduction)
    for chunk, logits in _chunks(x, w, padded=asynchronous):
        kernels.cross_entropy_forward(
            loss=loss[chunk],
            maximum=maximum[chunk],
            sum_exp=sum_exp[chunk],
            totals=totals,
            dx=None if gradients is None else logits,
            x=logits,
            bias=b,
            target=target[chunk],
            rows=logits.shape[0],
            cols=logits.shape[1],
            x_stride=logits.stride(0),
            dx_stride=logits.stride(0),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            scale=scale,
            dtype=DTYPES[x.dtype],
        )
        if gradients is not None:
            gradients.add(chunk, logits)
    result = reduce_rows(counting.put_back(loss), totals, reduction).to(x.dtype)
    saved = (counting.put_back(maximum), counting.put_back(sum_exp), totals[1].float())
    if gradients is None:
        return (result, *saved), None
    dx, dw, db = gradients.result()
    return (result, *saved), (counting.put_back(dx) if gradients.wanted[0] else dx, dw, db)


def _native(
    kernels: Kernels,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(kernels, x, w, b, target, reduction, ignore_index, label_smoothing, z_loss, None)[0]


def _native_gradients(
    kernels: Kernels,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    results, gradients = _run(kernels, x, w, b, target, reduction, ignore_index, label_smoothing, z_loss, wanted)
    assert gradients is not None
    return *results, *gradients


def _native_backward(
    kernels: Kernels,
    dloss: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    total: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    asynchronous = native.asynchronous(kernels)
    counting = _CountingRows(target, ignore_index, everything=asynchronous)
    x, target, b = counting.inputs(x), counting.select(target), None if b is None else b.contiguous()
    scale = counting.select(row_scale(dloss, total, reduction).expand(counting.rows))
    maximum, sum_exp = counting.select(maximum), counting.select(sum_exp)
    gradients = _Gradients(x, w, b, wanted)
    for chunk, logits in _chunks(x, w, padded=asynchronous):
        kernels.cross_entropy_backward(
            dx=logits,
            scale=scale[chunk],
            maximum=maximum[chunk],
            sum_exp=sum_exp[chunk],
            x=logits,
            bias=b,
            target=target[chunk],
            rows=logits.shape[0],
            cols=logits.shape[1],
            x_stride=logits.stride(0),
            dx_stride=logits.stride(0),
            scale_stride=1,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            dtype=DTYPES[x.dtype],
        )
        gradients.add(chunk, logits)
    dx, dw, db = gradients.result()
    return counting.put_back(dx) if wanted[0] else dx, dw, db


# --- registration ---


def _fake(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, reduction: str, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_loss(x, reduction)


def _fake_gradients(
    x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, reduction: str, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *fake_loss(x, reduction), *_empty_gradients(x, w, b, options[-1])


def _fake_backward(
    dloss: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x, w, b, options[-1])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        target: Tensor,
        reduction: str,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        options = (reduction, ignore_index, label_smoothing, z_loss)
        ctx.wanted = list(ctx.needs_input_grad[:3])
        ctx.gradients = None
        if reduction == "none":
            loss, *saved = registry.below_autograd(_op, x, w, b, target, *options, backend)
        else:
            loss, *rest = _op_gradients(x, w, b, target, *options, ctx.wanted, backend)
            saved, ctx.gradients = rest[:3], rest[3:]
        ctx.save_for_backward(x, w, b, target, *saved)
        ctx.options = (*options, ctx.wanted, backend)
        ctx.mark_non_differentiable(*saved)
        return (loss, *saved)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        registry.refuse_second_derivative("linear_cross_entropy")
        # The first backward gives the gradients away, so that they are scaled in place instead of in a second copy of
        # linear_weight's size. One that comes later, through a retained graph, computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _op_backward(dloss, *ctx.saved_tensors, *ctx.options)
        else:
            # Mostly by one. Only the CPU's kernels may look: on a GPU that is a wait, and in a graph it is not known.
            looks = ctx.options[-1] == "cpu" and type(dloss) is Tensor
            if not looks or dloss.item() != 1:
                for gradient in gradients:
                    gradient.mul_(dloss)
        wanted = (gradient if want else None for gradient, want in zip(gradients, ctx.wanted, strict=True))
        return *wanted, None, None, None, None, None, None


_TENSORS = "Tensor x, Tensor w, Tensor? b, Tensor target"
_OPTIONS = "str reduction, int ignore_index, float label_smoothing, float z_loss"
_op = registry.define(
    "linear_cross_entropy",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _LinearCrossEntropy,
)
_op_gradients = registry.define(
    "linear_cross_entropy_gradients",
    f"({_TENSORS}, {_OPTIONS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference_gradients, **native.backends(_native_gradients)},
    _fake_gradients,
)
_op_backward = registry.define(
    "linear_cross_entropy_backward",
    f"(Tensor dloss, {_TENSORS}, Tensor maximum, Tensor sum_exp, Tensor total, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
