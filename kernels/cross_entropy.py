"""cross_entropy: forward and backward on rows of C logits; linear_cross_entropy calls both on chunks of its logits.

    m = max(x), s = sum(exp(x - m)), lse = m + log(s), q = (1 - e) onehot(target) + e / C
    loss = (1 - e) (log(s) - (x[target] - m)) + e (log(s) - mean(x - m)) + z lse^2
    dx = g (exp(x - m) / s (1 + 2 z lse) - q)

Bytes: forward reads x once; backward reads x and writes dx. A forward that also wants dx reads the row again, from L2
where the rows in flight fit there.

A program has a tile of logits: a piece of one long row after the other, or several short rows. Every place of the tile
keeps a maximum and a sum of exponentials relative to it, so nothing is exchanged between threads before the end of the
row; and one exponential for each logit is enough, of -|x - maximum|: it scales either the sum or the new term. What a
row computes once is float64, as is the sum over the places: where one class has nearly all the weight, the loss is what
is left beside 1. m and s are kept, not lse, see csrc/cpu/cross_entropy.cpp.

A target outside [0, C) cannot be an exception without waiting for the device: its row's loss and gradient are NaN.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch, one_config

WIDEST = 4096  # logits of a row at a time
MOST_CLASSES = 2**31 - 1 - WIDEST  # counted in int32
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: what finite maxima begin with, since -inf - -inf is NaN


@triton.jit
def _targets(target, row, rows, cols, ignore_index):
    """(target, -1 for a row without gradient; whether it has one; otherwise, what loss and gradient are)."""
    t = tl.load(target + row, mask=row < rows, other=ignore_index)
    live = (row < rows) & (t != ignore_index) & (t >= 0) & (t < cols)
    return tl.where(live, t, -1).to(tl.int32), live, tl.where(t == ignore_index, 0.0, float("nan"))


@triton.jit
def _logits(x, bias, col, inside, columns, other):
    """The float32 logits at x + col where ``inside``; ``columns`` is the mask of the bias, None for all."""
    v = tl.load(x + col, mask=inside, other=other).to(tl.float32)
    if bias is not None:
        if columns is None:
            v += tl.load(bias + col).to(tl.float32)
        else:
            v += tl.load(bias + col, mask=columns, other=0.0).to(tl.float32)
    return v


@triton.jit
def _add(m, s, below, v, inside, offset, SMOOTH: tl.constexpr):
    """v joins every place's maximum m, its sum s of exp(v - m), and with SMOOTH the sum of v - offset."""
    e = tl.exp(-tl.abs(v - m))
    higher = v > m  # never with NaN, which goes to the sum
    s = tl.where(higher, s * e + 1, s + e)
    m = tl.where(higher, v, m)
    if SMOOTH:
        below += tl.where(inside, v - offset, 0.0)
    return m, s, below


@triton.jit
def _inverse(x):
    """1 / x to 2^-46 by Newton's step from float32's; a division of float64 is a long subroutine."""
    rough = (1.0 / x.to(tl.float32)).to(tl.float64)
    return rough * (2.0 - x * rough)


@triton.jit
def _store_gradient(
    dx, x, bias, inside, cols, t, live, fill, at_target, m, s, g, label_smoothing, z_loss,
    SMOOTH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx may be x: a thread reads its logits before it writes them, and all have read the target's."""
    of_exp = g * _inverse(s)
    if z_loss > 0:
        of_exp *= 1.0 + 2.0 * z_loss * (m + tl.log(s))
    of_class = tl.zeros_like(of_exp)
    of_target = g
    if SMOOTH:
        of_class += g * label_smoothing * _inverse(cols.to(tl.float64))
        of_target -= g * label_smoothing
    # In float64, since it is what softmax lacks to 1.
    gradient = tl.exp(at_target - m).to(tl.float64) * of_exp - of_class - of_target
    gradient = tl.where(live, gradient.to(tl.float32), fill)[:, None]
    scale = tl.where(live, of_exp.to(tl.float32), 0.0)[:, None]
    offset = tl.where(live, of_class.to(tl.float32), fill)[:, None]
    shift = tl.where(live, m, 0.0)[:, None]
    t, live = t[:, None], live[:, None]
    tl.debug_barrier()
    col = tl.arange(0, COLS)[None, :]
    full = cols // COLS * COLS
    for start in range(0, full, COLS):
        v = _logits(x, bias, start + col, live, None, 0.0)
        d = tl.where(start + col == t, gradient, tl.exp(v - shift) * scale - offset)
        tl.store(dx + start + col, d.to(dx.dtype.element_ty), mask=inside)
    if full < cols:
        col += full
        columns = col < cols
        v = _logits(x, bias, col, live & columns, columns, 0.0)
        d = tl.where(col == t, gradient, tl.exp(v - shift) * scale - offset)
        tl.store(dx + col, d.to(dx.dtype.element_ty), mask=inside & columns)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_forward_kernel(
    loss, maximum, sum_exp, dx, x, bias, target, scale, rows, cols, x_stride, dx_stride, ignore_index, label_smoothing,
    z_loss, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, live, fill = _targets(target, row, rows, cols, ignore_index)
    x += (row * x_stride)[:, None]
    at_target = tl.reshape(_logits(x, bias, t[:, None], live[:, None], live[:, None], 0.0), [ROWS])
    offset = tl.where(tl.abs(at_target) < float("inf"), at_target, 0.0)  # near the others, so that little is lost

    m = tl.full([ROWS, COLS], LOWEST, tl.float32)
    s = tl.zeros([ROWS, COLS], tl.float32)
    below = tl.zeros([ROWS, COLS], tl.float32)
    col = tl.arange(0, COLS)[None, :]
    end = tl.where(tl.max(live.to(tl.int32), 0) > 0, cols, 0)
    full = end // COLS * COLS
    for start in range(0, full, COLS):  # without a mask of columns, which would forbid wide loads
        v = _logits(x, bias, start + col, live[:, None], None, LOWEST)
        m, s, below = _add(m, s, below, v, live[:, None], offset[:, None], SMOOTH)
    if full < end:
        columns = full + col < cols
        v = _logits(x, bias, full + col, live[:, None] & columns, columns, -float("inf"))
        m, s, below = _add(m, s, below, v, columns, offset[:, None], SMOOTH)

    place_m, m = m, tl.max(m, 1)
    s = tl.sum((s * tl.exp(place_m - m[:, None])).to(tl.float64), 1)
    log_sum = tl.log(s)
    result = log_sum - (at_target - m).to(tl.float64)
    if SMOOTH:
        mean = tl.sum(below.to(tl.float64), 1) * _inverse(cols.to(tl.float64)) + offset
        share = tl.zeros_like(mean) + label_smoothing  # as float64, so that 1 - share is not rounded
        result = (1.0 - share) * result + share * (log_sum - (mean - m))
    lse = m + log_sum
    result += z_loss * lse * lse
    inside = row < rows
    tl.store(loss + row, tl.where(live, result.to(tl.float32), fill), mask=inside)
    tl.store(maximum + row, tl.where(live, m, fill), mask=inside)
    tl.store(sum_exp + row, tl.where(live, s.to(tl.float32), fill), mask=inside)
    if dx is not None:
        _store_gradient(
            dx + (row * dx_stride)[:, None], x, bias, inside[:, None], cols, t, live, fill, at_target, m, s,
            tl.load(scale), label_smoothing, z_loss, SMOOTH, COLS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "scale_stride", "ignore_index"])
def cross_entropy_backward_kernel(
    dx, scale, maximum, sum_exp, x, bias, target, rows, cols, x_stride, dx_stride, scale_stride, ignore_index,
    label_smoothing, z_loss, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, live, fill = _targets(target, row, rows, cols, ignore_index)
    x += (row * x_stride)[:, None]
    at_target = tl.reshape(_logits(x, bias, t[:, None], live[:, None], live[:, None], 0.0), [ROWS])
    m = tl.load(maximum + row, mask=live, other=0.0)
    s = tl.load(sum_exp + row, mask=live, other=1.0).to(tl.float64)
    g = tl.load(scale + row * scale_stride, mask=live, other=0.0).to(tl.float64)
    _store_gradient(
        dx + (row * dx_stride)[:, None], x, bias, (row < rows)[:, None], cols, t, live, fill, at_target, m, s, g,
        label_smoothing, z_loss, SMOOTH, COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def cross_entropy_totals_kernel(totals, loss, target, rows, ignore_index, ROWS: tl.constexpr):
    """One program, each place of its tile the same rows whatever the device: the bits are always the same."""
    losses = tl.zeros([ROWS], tl.float64)
    counts = tl.zeros([ROWS], tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        counting = (row < rows) & (tl.load(target + row, mask=row < rows, other=0) != ignore_index)
        losses += tl.load(loss + row, mask=counting, other=0.0).to(tl.float64)
        counts += counting.to(tl.int32)
    tl.store(totals, tl.load(totals) + tl.sum(losses, 0))
    tl.store(totals + 1, tl.load(totals + 1) + tl.sum(counts, 0).to(tl.float64))


def cross_entropy_forward(
    *, loss: Tensor, maximum: Tensor, sum_exp: Tensor, totals: Tensor, dx: Tensor | None, x: Tensor,
    bias: Tensor | None, target: Tensor, scale: Tensor | None, rows: int, cols: int, x_stride: int, dx_stride: int,
    ignore_index: int, label_smoothing: float, z_loss: float, dtype: int,
) -> None:  # fmt: skip
    if rows == 0:
        return
    grid, configs = _tiles(rows, cols)
    launch(
        cross_entropy_forward_kernel, grid, loss, maximum, sum_exp, dx, x, bias, target, scale, rows, cols, x_stride,
        dx_stride, ignore_index, label_smoothing, z_loss, configs=configs, SMOOTH=label_smoothing > 0,
    )  # fmt: skip
    configs = one_config(ROWS=1024, num_warps=8)
    launch(cross_entropy_totals_kernel, (1,), totals, loss, target, rows, ignore_index, configs=configs)


def cross_entropy_backward(
    *, dx: Tensor, scale: Tensor, maximum: Tensor, sum_exp: Tensor, x: Tensor, bias: Tensor | None, target: Tensor,
    rows: int, cols: int, x_stride: int, dx_stride: int, scale_stride: int, ignore_index: int, label_smoothing: float,
    z_loss: float, dtype: int,
) -> None:  # fmt: skip
    grid, configs = _tiles(rows, cols)
    launch(
        cross_entropy_backward_kernel, grid, dx, scale, maximum, sum_exp, x, bias, target, rows, cols, x_stride,
        dx_stride, scale_stride, ignore_index, label_smoothing, z_loss, configs=configs, SMOOTH=label_smoothing > 0,
    )  # fmt: skip


def _tiles(rows: int, cols: int) -> tuple[Any, Any]:
    """(grid, configs): 8 logits a thread. A long row has many threads, so that the rows in flight fit into L2."""
    if cols > MOST_CLASSES:
        raise ValueError(f"cross_entropy: {cols} classes; the Triton kernels take up to {MOST_CLASSES}")
    width = min(triton.next_power_of_2(cols), WIDEST)
    tile = max(width, 2048)
    return (triton.cdiv(rows, tile // width),), one_config(ROWS=tile // width, COLS=width, num_warps=tile // 256)
