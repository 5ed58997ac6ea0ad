"""What layer_norm and rms_norm share: with ``mean`` (not None) the mean is subtracted, and there is a bias.

A program holds a tile of whole rows in registers: several rows where they are narrow, a power of two of columns of
which those beyond the row are masked. Rows too wide for that are gone through in blocks of columns, and read again.

Forward: N C elements read and written (twice that with a residual). The mean is known before the squares are summed,
from registers, so the variance does not cancel.
Backward: a program takes a chunk of rows and keeps its part of dweight and dbias in registers meanwhile, so x and dy
are read once: 3 N C elements, and 8 C bytes for each sum and chunk of at least 16 rows (core.py). For wide rows one
kernel leaves the two means that a row's gradient needs, and a second has a block of columns of a chunk of rows: 5 N C.

How a row is shared out depends on its width, never on the other rows or the device: neither do the bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.core import chunk_rows, write_column_sums
from fastgpt.kernels.launch import launch, one_config

HELD_FORWARD, HELD_BACKWARD = 16384, 16384  # the widest row that a program holds: in elements, in bytes
BLOCK = 4096  # columns at a time of a wider one
MOST_COLS = 2**31 - BLOCK  # columns are counted in 32 bits
TILE_FORWARD, TILE_BACKWARD = 1024, 2048  # elements that a program holds of narrow rows: 8 for each of its threads


# --- forward ---


@triton.jit
def _tile_of(row, col, rows, cols):
    """(offsets, mask) of a tile of rows x columns; ``row`` is int64."""
    return row[:, None] * cols + col[None, :], (row < rows)[:, None] & (col < cols)[None, :]


@triton.jit
def _load_sum(x, residual, at, inside):
    """What is normalised: with a residual the sum as rounded to its dtype, as the caller sees it."""
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        s = s.to(x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _row_mean(sums, cols):
    return tl.div_rn(tl.sum(sums, 1), tl.cast(cols, tl.float32))


@triton.jit
def _row_rstd(squares, cols, eps):
    """1 / sqrt(mean(squares) + eps), each step rounded once: rsqrt is 2 ulp off, and the whole row with it."""
    return tl.div_rn(1.0, tl.sqrt_rn(_row_mean(squares, cols) + eps))


@triton.jit
def _store_normalised(y, xhat, weight, bias, at, inside, col, cols):
    """y = xhat * weight + bias, of those that there are."""
    if weight is not None:
        xhat *= tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        xhat += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, xhat.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    y, sum, mean, rstd, x, residual, weight, bias, rows, cols, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Rows that are held."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    at, inside = _tile_of(row, col, rows, cols)
    s = _load_sum(x, residual, at, inside)
    if residual is not None:
        tl.store(sum + at, s.to(sum.dtype.element_ty), mask=inside)
    if mean is not None:
        m = _row_mean(s, cols)
        tl.store(mean + row, m, mask=row < rows)
        s = tl.where(inside, s - m[:, None], 0.0)
    r = _row_rstd(s * s, cols, eps)
    tl.store(rstd + row, r, mask=row < rows)
    _store_normalised(y, s * r[:, None], weight, bias, at, inside, col, cols)


@triton.jit(do_not_specialize=["rows"])
def norm_forward_wide_kernel(
    y, sum, mean, rstd, x, residual, weight, bias, rows, cols, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Rows in blocks of columns, read once for each of the mean, the squares and y: all but the first from caches."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.zeros((ROWS,), tl.float32)
    if (mean is not None) or (residual is not None):
        sums = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, cols, COLS):
            at, inside = _tile_of(row, start + tl.arange(0, COLS), rows, cols)
            s = _load_sum(x, residual, at, inside)
            if residual is not None:
                tl.store(sum + at, s.to(sum.dtype.element_ty), mask=inside)
            sums += s
        if mean is not None:
            m = _row_mean(sums, cols)
            tl.store(mean + row, m, mask=row < rows)
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, cols, COLS):
        at, inside = _tile_of(row, start + tl.arange(0, COLS), rows, cols)
        s = tl.where(inside, _load_sum(x, residual, at, inside) - m[:, None], 0.0)
        squares += s * s
    r = _row_rstd(squares, cols, eps)
    tl.store(rstd + row, r, mask=row < rows)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        at, inside = _tile_of(row, col, rows, cols)
        xhat = (_load_sum(x, residual, at, inside) - m[:, None]) * r[:, None]
        _store_normalised(y, xhat, weight, bias, at, inside, col, cols)


def norm_forward(
    y: Tensor, sum: Tensor | None, mean: Tensor | None, rstd: Tensor, x: Tensor, residual: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, rows: int, cols: int, eps: float,
) -> None:  # fmt: skip
    wide = cols > HELD_FORWARD
    tile = _tile(cols, wide, TILE_FORWARD)
    launch(
        norm_forward_wide_kernel if wide else norm_forward_kernel, (triton.cdiv(rows, tile["ROWS"]),), y, sum, mean,
        rstd, x, residual, weight, bias, rows, cols, eps, configs=one_config(**tile, num_warps=_warps(tile)),
    )  # fmt: skip


def _tile(cols: int, wide: bool, elements: int) -> dict[str, int]:
    """The rows and columns that a program holds."""
    if cols > MOST_COLS:
        raise ValueError(f"backend='triton' takes rows of at most {MOST_COLS} elements, not {cols}")
    width = BLOCK if wide else triton.next_power_of_2(cols)
    return {"ROWS": max(elements // width, 1), "COLS": width}


def _warps(tile: dict[str, int]) -> int:
    """For 8 elements a thread; of the widest rows 16, forward 32."""
    return min(tile["ROWS"] * tile["COLS"] // 256, 16)


# --- backward ---


@triton.jit
def _load_weight(weight, col, cols):
    if weight is not None:
        return tl.load(weight + col, mask=col < cols, other=0.0)
    else:
        return None


@triton.jit
def _load_gradient(dy, x, weight, mean, rstd, row, col, rows, cols):
    """(dy, xhat, g = dy * weight, rstd) of a tile, zero outside; ``weight`` is that of the columns, or None."""
    at, inside = _tile_of(row, col, rows, cols)
    r = tl.load(rstd + row, mask=row < rows, other=0.0)
    xhat = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        xhat -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
    xhat = tl.where(inside, xhat * r[:, None], 0.0)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    g = d
    if weight is not None:
        g *= weight.to(tl.float32)[None, :]
    return d, xhat, g, r


@triton.jit
def _row_means(products, g, cols):
    """mean(g * xhat) and mean(g) of rows."""
    return tl.sum(products, 1) / cols, tl.sum(g, 1) / cols


@triton.jit(do_not_specialize=["rows"])
def norm_backward_means_kernel(
    means, dy, x, weight, mean, rstd, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """means[0]: mean(g * xhat) of every row, means[1]: mean(g), for rows wider than a program holds."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    products = tl.zeros((ROWS, COLS), tl.float32)
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        _, xhat, g, _ = _load_gradient(dy, x, _load_weight(weight, col, cols), mean, rstd, row, col, rows, cols)
        products += g * xhat
        sums += g
    mean_gx, mean_g = _row_means(products, sums, cols)
    tl.store(means + row, mean_gx, mask=row < rows)
    tl.store(means + rows + row, mean_g, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "rows_of_chunk"])
def norm_backward_kernel(
    dx, partial, dy, dsum, x, weight, mean, rstd, means, rows, cols, rows_of_chunk, DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """A chunk of rows: all their columns, or a block of them where ``means`` holds the means of the rows.

    partial[chunk][kind][column]; kinds: dweight, dbias or both, in this order.
    """
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    w = _load_weight(weight, col, cols)
    weight_sums = tl.zeros((ROWS, COLS), tl.float32)
    bias_sums = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(chunk * rows_of_chunk, min((chunk + 1) * rows_of_chunk, rows), ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        d, xhat, g, r = _load_gradient(dy, x, w, mean, rstd, row, col, rows, cols)
        if means is None:
            mean_gx, mean_g = _row_means(g * xhat, g, cols)
        else:
            mean_gx = tl.load(means + row, mask=row < rows, other=0.0)
            mean_g = tl.load(means + rows + row, mask=row < rows, other=0.0)
        out = g - xhat * mean_gx[:, None]
        if mean is not None:
            out -= mean_g[:, None]
        out *= r[:, None]
        at, inside = _tile_of(row, col, rows, cols)
        if dsum is not None:
            out += tl.load(dsum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        weight_sums += d * xhat
        bias_sums += d
    if DWEIGHT:
        tl.store(partial + chunk * (1 + DBIAS) * cols + col, tl.sum(weight_sums, 0), mask=col < cols)
    if DBIAS:
        tl.store(partial + (chunk * (1 + DWEIGHT) + DWEIGHT) * cols + col, tl.sum(bias_sums, 0), mask=col < cols)


def norm_backward(
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, dy: Tensor, dsum: Tensor | None, x: Tensor,
    weight: Tensor | None, mean: Tensor | None, rstd: Tensor, rows: int, cols: int,
) -> None:  # fmt: skip
    wide = cols * max(t.element_size() for t in (x, weight) if t is not None) > HELD_BACKWARD
    tile = _tile(cols, wide, TILE_BACKWARD)
    means = torch.empty((2, rows), dtype=torch.float32, device=x.device) if wide else None
    if wide:
        launch(
            norm_backward_means_kernel, (triton.cdiv(rows, tile["ROWS"]),), means, dy, x, weight, mean, rstd, rows,
            cols, configs=one_config(**tile, num_warps=_warps(tile)),
        )  # fmt: skip
    rows_of_chunk = chunk_rows(rows, tile["ROWS"])
    chunks = triton.cdiv(rows, rows_of_chunk)
    sums = [sum for sum in (dweight, dbias) if sum is not None]
    partial = torch.empty((chunks, len(sums), cols), dtype=torch.float32, device=x.device) if sums else None
    launch(
        norm_backward_kernel, (chunks, triton.cdiv(cols, tile["COLS"])), dx, partial, dy, dsum, x, weight, mean, rstd,
        means, rows, cols, rows_of_chunk, DWEIGHT=dweight is not None, DBIAS=dbias is not None,
        configs=one_config(**tile, num_warps=_warps(tile)),
    )  # fmt: skip
    if sums:
        write_column_sums(partial, *sums)
