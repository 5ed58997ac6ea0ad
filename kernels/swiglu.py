"""swiglu, forward and backward: y = g s u with s = sigmoid(g), g the gate and u the upward projection (Shazeer, 2020).

    dup = dy g s,  dgate = dy u s (1 + g (1 - s))

Rows may lie apart (slices of one fused projection), so nothing is copied first: a program has a tile of rows and
columns. Bytes: forward reads g and u and writes y (3 N C elements); backward reads dy, g and u and writes dgate and dup
(5 N C); s is recomputed. About 20 operations an element, in float32: memory decides.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.elementwise import KEEP_NAN, sigmoid, tile_at, tiles
from fastgpt.kernels.launch import launch


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward_kernel(
    y, gate, up, rows, cols, gate_stride, up_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    row, col, inside = tile_at(rows, cols, ROWS, COLS)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    s, _ = sigmoid(g, HALF)
    out = u * (tl.maximum(g, -200.0, KEEP_NAN) * s)  # s is 0 there: no inf * 0
    tl.store(y + row * cols + col, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    dgate, dup, dy, gate, up, rows, cols, gate_stride, up_stride, gradient_stride, ROWS: tl.constexpr,
    COLS: tl.constexpr
):  # fmt: skip
    HALF: tl.constexpr = dgate.dtype.element_ty.primitive_bitwidth == 16
    row, col, inside = tile_at(rows, cols, ROWS, COLS)
    g = tl.load(gate + row * gate_stride + col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    s, complement = sigmoid(g, HALF)
    silu = tl.maximum(g, -200.0, KEEP_NAN) * s
    # silu (1 - s) = g s (1 - s) vanishes for large g, where silu may be infinite.
    bend = tl.where(g > 200.0, 0.0, silu * complement)
    into = row * gradient_stride + col
    tl.store(dgate + into, (d * u * (s + bend)).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + into, (d * silu).to(dup.dtype.element_ty), mask=inside)


def swiglu_forward(
    *, y: Tensor, gate: Tensor, up: Tensor, rows: int, cols: int, gate_stride: int, up_stride: int, dtype: int
) -> None:
    grid, configs = tiles(rows, cols)
    launch(swiglu_forward_kernel, grid, y, gate, up, rows, cols, gate_stride, up_stride, configs=configs)


def swiglu_backward(
    *, dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor, rows: int, cols: int, gate_stride: int,
    up_stride: int, gradient_stride: int, dtype: int,
) -> None:  # fmt: skip
    grid, configs = tiles(rows, cols)
    launch(
        swiglu_backward_kernel, grid, dgate, dup, dy, gate, up, rows, cols, gate_stride, up_stride, gradient_stride,
        configs=configs,
    )  # fmt: skip
