"""What cross_entropy and linear_cross_entropy share: the checks of options and targets, and the shapes of results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.ops import checks
from fastgpt.ops.numerics import accumulate


def check_options(op: str, reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction={reduction!r} is unknown; allowed are 'none', 'mean', 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing={label_smoothing} must lie in [0, 1]")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{op}: z_loss={z_loss} must be a finite number >= 0")


def check_shapes(op: str, logits: torch.Size, target: Tensor) -> bool:
    """Whether ``target`` holds class probabilities (as torch decides: by its shape); errors for any other misfit."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, not {type(target).__name__}")
    if not logits:
        raise ValueError(f"{op}: input has shape (); allowed are (C,), (N, C) and (N, C, d1, ...)")
    classes = logits[min(1, len(logits) - 1)]
    if not classes:
        raise ValueError(f"{op}: the logits have shape {tuple(logits)}, which has no classes; at least one is needed")
    if target.shape == logits:
        if not target.is_floating_point():
            raise TypeError(
                f"{op}: target has the logits' shape {tuple(logits)} and so holds class probabilities, but its dtype "
                f"is {target.dtype}; it must be floating (or, for class indices, of shape {_index_shape(logits)})"
            )
        return True
    if target.shape != _index_shape(logits) and not (len(logits) == 1 and target.shape == (1,)):
        raise ValueError(
            f"{op}: target has shape {tuple(target.shape)}; for logits of shape {tuple(logits)} it must be "
            f"{_index_shape(logits)} (class indices) or {tuple(logits)} (class probabilities)"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{op}: target has dtype {target.dtype}; class indices must be int64 or uint8")
    return False


def _index_shape(logits: torch.Size) -> tuple[int, ...]:
    return (*logits[:1], *logits[2:]) if len(logits) > 1 else ()


def check_class_weight(op: str, weight: Tensor | None, input: Tensor, classes: int, probabilities: bool) -> None:
    checks.like(op, "weight", weight, "input", input, float32_too=probabilities)  # as torch
    checks.shape(op, "weight", weight, (classes,), "one weight for each class")


def unfused_options(weight: Tensor | None, probabilities: bool) -> str | None:
    """What keeps these arguments from our own operators, reference included; torch computes them."""
    if weight is not None:
        return "class weights"
    return "class-probability targets" if probabilities else None


def check_targets(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is in [0, classes) or ignore_index."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"{op}: target {int(target[row])} in row {row} is out of bounds; allowed are 0 to {classes - 1} and "
            f"ignore_index={ignore_index}"
        )


def row_scale(dloss: Tensor, total: Tensor, reduction: str) -> Tensor:
    """The gradient that reaches each row's loss: (N,) for "none", a scalar for all rows otherwise."""
    g = accumulate(dloss)
    return g / total if reduction == "mean" else g


def upfront_scale(target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """``row_scale`` of a loss whose own gradient is 1, for a gradient that is computed with the loss: 0-d float64."""
    scale = torch.ones((), dtype=torch.float64, device=target.device)
    return scale / (target != ignore_index).sum() if reduction == "mean" else scale


def reduce_rows(loss: Tensor, totals: Tensor, reduction: str) -> Tensor:
    """The result from the losses of the rows (N,) and the kernel's [sum of losses, number of rows that count]."""
    if reduction == "none":
        return loss
    return totals[0] / totals[1] if reduction == "mean" else totals[0]


def fake_loss(x: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of (loss, maximum, sum_exp, total)."""
    loss = x.new_empty(x.shape[:1] if reduction == "none" else ())
    maximum = x.new_empty(x.shape[:1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return loss, maximum, torch.empty_like(maximum), maximum.new_empty(())
