"""gelu of s = x + bias, exact or by the tanh approximation, forward and backward (Hendrycks and Gimpel, 2016).

    exact: y = s Phi(s),     y' = Phi(s) + s phi(s)           (normal distribution and density)
    tanh:  y = s sigmoid(z), y' = p + s p (1 - p) z',  p = sigmoid(z), z = 2 sqrt(2/pi) (s + 0.044715 s^3)

(1 + tanh u) / 2 = sigmoid(2u), so the tanh form needs one exponential and no tanh, and does not cancel for negative s.
Bytes: forward reads x and writes y (2 N C elements), backward reads x and dy and writes dx (3 N C); everything is
recomputed from x. About 30 operations an element (exact) or 20 (tanh).

dbias: a program takes a strip of columns of a chunk of rows; core.py adds the chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.core import chunk_rows, write_column_sums
from fastgpt.kernels.elementwise import KEEP_NAN, exp_negative, reciprocal, sigmoid, tile, tile_at, tiles
from fastgpt.kernels.launch import launch, one_config

# Beyond +-limit the derivative is 0 or 1 to the last bit, and so is y / s; the bounds keep inf * 0 out. NaN passes.
EXACT_LIMIT, TANH_LIMIT = tl.constexpr(15.0), tl.constexpr(100.0)
SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _normal(x, HALF: tl.constexpr):
    """The normal distribution Phi(x) = (1 + erf(x / sqrt 2)) / 2 and its density phi(x) = e^(-x^2/2) / sqrt(2 pi).

    With t = |x|: Phi(-t) = e^(-t^2/2) R(t), and R(t) (t + a) is a polynomial in u = (t - a) / (t + a), the fit of
    csrc/core/normal.h, which says where it comes from. One exponential gives both, there is no branch, and the negative
    tail keeps its relative accuracy, which 1 + erf loses.
    """
    t = tl.minimum(tl.abs(x), 14.4, KEEP_NAN)  # e^(-t^2/2) R(t) is below float's range from 14.2 on
    if HALF:
        gauss = exp_negative(t * t * -0.5, HALF)
        inverse = reciprocal(t + 3.2, HALF)
        u = 1.0 - 6.4 * inverse
        p = 0.00720118545 * u - 0.00215018983
        p = p * u - 0.0736861452
        p = p * u + 0.265934944
        p = p * u - 0.533835113
        p = p * u + 0.735885799
    else:
        # t = high + low with a high whose square is exact: what rounding t^2 loses, the exponential would magnify.
        high = (t.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        gauss = exp_negative(high * high * -0.5, HALF, (t - high) * (t + high) * -0.5)
        inverse = reciprocal(t + 3.4, HALF)
        u = 1.0 - 6.8 * inverse
        p = 0.000129213833 * u + 0.000331833289
        p = p * u - 0.00078861753
        p = p * u - 0.00244819
        p = p * u + 0.00762810139
        p = p * u + 0.010374181
        p = p * u - 0.101905957
        p = p * u + 0.299455613
        p = p * u - 0.55557847
        p = p * u + 0.741770804
    tail = gauss * (p * inverse)
    return tl.where(x < 0.0, tail, 1.0 - tail), gauss * 0.398942280401432678


@triton.jit
def _gelu(s, TANH: tl.constexpr, HALF: tl.constexpr):
    if TANH:
        bounded = tl.maximum(s, -TANH_LIMIT, KEEP_NAN)
        p, _ = sigmoid(bounded * (SLOPE + SLOPE * CUBIC * (bounded * bounded)), HALF)
        return bounded * p
    else:
        cdf, _ = _normal(s, HALF)
        return tl.maximum(s, -EXACT_LIMIT, KEEP_NAN) * cdf


@triton.jit
def _gelu_derivative(s, TANH: tl.constexpr, HALF: tl.constexpr):
    if TANH:
        bounded = tl.minimum(tl.maximum(s, -TANH_LIMIT, KEEP_NAN), TANH_LIMIT, KEEP_NAN)
        square = bounded * bounded
        p, rest = sigmoid(bounded * (SLOPE + SLOPE * CUBIC * square), HALF)
        return p + p * rest * (bounded * (SLOPE + 3.0 * SLOPE * CUBIC * square))
    else:
        bounded = tl.minimum(tl.maximum(s, -EXACT_LIMIT, KEEP_NAN), EXACT_LIMIT, KEEP_NAN)
        cdf, density = _normal(bounded, HALF)
        return cdf + bounded * density


@triton.jit(do_not_specialize=["rows"])
def gelu_forward_kernel(y, x, bias, rows, cols, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    HALF: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    row, col, inside = tile_at(rows, cols, ROWS, COLS)
    s = tl.load(x + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        s += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, _gelu(s, TANH, HALF).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward_kernel(dx, dy, x, rows, cols, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    HALF: tl.constexpr = dx.dtype.element_ty.primitive_bitwidth == 16
    row, col, inside = tile_at(rows, cols, ROWS, COLS)
    s = tl.load(x + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + row * cols + col, (d * _gelu_derivative(s, TANH, HALF)).to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "rows_of_chunk"])
def gelu_bias_backward_kernel(
    dx, partial, dy, x, bias, rows, cols, rows_of_chunk, TANH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Also the chunk's part of dbias, to partial[chunk][col]. In full precision whatever x is: the bias may be float32,
    and so is its gradient then."""
    chunk = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[:, None]
    shift = tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    sums = tl.zeros((COLS, ROWS), tl.float32)
    first = chunk * rows_of_chunk
    for start in range(first, tl.minimum(first + rows_of_chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)[None, :]
        inside = (row < rows) & (col < cols)
        s = tl.load(x + row * cols + col, mask=inside, other=0.0).to(tl.float32) + shift
        d = tl.load(dy + row * cols + col, mask=inside, other=0.0).to(tl.float32)
        d *= _gelu_derivative(s, TANH, False)
        tl.store(dx + row * cols + col, d.to(dx.dtype.element_ty), mask=inside)
        sums += d
    tl.store(partial + chunk * cols + col, tl.sum(sums, 1)[:, None], mask=col < cols)


def gelu_forward(
    *, y: Tensor, x: Tensor, bias: Tensor | None, rows: int, cols: int, tanh: bool, dtype: int, bias_dtype: int
) -> None:
    grid, configs = tiles(rows, cols)
    launch(gelu_forward_kernel, grid, y, x, bias, rows, cols, configs=configs, TANH=tanh)


def gelu_backward(
    *, dx: Tensor, dbias: Tensor | None, dy: Tensor, x: Tensor, bias: Tensor | None, rows: int, cols: int, tanh: bool,
    dtype: int, bias_dtype: int,
) -> None:  # fmt: skip
    if bias is None or dbias is None:
        grid, configs = tiles(rows, cols)
        launch(gelu_backward_kernel, grid, dx, dy, x, rows, cols, configs=configs, TANH=tanh)
        return
    size = tile(rows, cols)
    chunk = chunk_rows(rows, 2 * size["ROWS"])
    chunks = triton.cdiv(rows, chunk)
    partial = torch.empty((chunks, 1, cols), dtype=torch.float32, device=x.device)
    launch(
        gelu_bias_backward_kernel, (triton.cdiv(cols, size["COLS"]), chunks), dx, partial, dy, x, bias, rows, cols,
        chunk, configs=one_config(**size, num_warps=8), TANH=tanh,
    )  # fmt: skip
    write_column_sums(partial, dbias)
