"""rotary: each pair (x1, x2) of a head's first R dims is turned by the angle of its position (Su et al., 2021).

    y1 = x1 cos - x2 sin,  y2 = x2 cos + x1 sin;  inverse (the gradient): sin -> -sin
    pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; dims from R on are copied

A row is one head of one token, D elements that lie together; a program has a tile of rows, wherever they lie. Pairs
that are neighbours are loaded as one piece and split in registers. Bytes: reads x and writes y once; a row of the
tables serves all heads from the caches. 6 operations a pair: memory decides. Nothing is fused, so that the bits do not
depend on how x is aligned.

A position outside the tables cannot be an exception without waiting for the device: its rows of y are NaN.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch, one_config

TILE = 2048  # pairs of a program


@triton.jit(do_not_specialize=["rows", "heads", "length", "start", "max_len"])
def rotary_kernel(
    y, x, cos, sin, starts, rows, heads, length, start, max_len, y_batch, y_head, y_row, x_batch, x_head, x_row,
    DIM: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ROWS: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(rows.dtype) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head = row // length
    t = (row - head * length).to(tl.int64)
    b = (head // heads).to(tl.int64)
    h = head - b * heads
    x += (b * x_batch + h * x_head + t * x_row)[:, None]
    y += (b * y_batch + h * y_head + t * y_row)[:, None]

    first = tl.full((ROWS,), start, tl.int64) if starts is None else tl.load(starts + b, mask=inside, other=0)
    known = (first >= 0) & (first < max_len - t)
    inside, known = inside[:, None], (inside & known)[:, None]
    HALF: tl.constexpr = ROTATED // 2
    if HALF > 0:
        pair = tl.arange(0, PAIRS)[None, :]
        at = tl.where(known, (first + t)[:, None], 0) * HALF + pair
        c = tl.load(cos + at, mask=known & (pair < HALF), other=float("nan")).to(tl.float32)
        s = tl.load(sin + at, mask=known & (pair < HALF), other=float("nan")).to(tl.float32)
        if INVERSE:
            s = -s
        if INTERLEAVED:
            dim = tl.arange(0, 2 * PAIRS)[None, :]
            turning = inside & (dim < ROTATED)
            both = tl.load(x + dim, mask=turning, other=0.0).to(tl.float32)
            x1, x2 = tl.split(both.reshape(ROWS, PAIRS, 2))
            both = tl.join(x1 * c - x2 * s, x2 * c + x1 * s).reshape(ROWS, 2 * PAIRS)
            tl.store(y + dim, both.to(y.dtype.element_ty), mask=turning)
        else:
            turning = inside & (pair < HALF)
            x1 = tl.load(x + pair, mask=turning, other=0.0).to(tl.float32)
            x2 = tl.load(x + HALF + pair, mask=turning, other=0.0).to(tl.float32)
            tl.store(y + pair, (x1 * c - x2 * s).to(y.dtype.element_ty), mask=turning)
            tl.store(y + HALF + pair, (x2 * c + x1 * s).to(y.dtype.element_ty), mask=turning)
    if DIM > ROTATED:
        dim = ROTATED + tl.arange(0, REST)[None, :]
        copied = tl.load(x + dim, mask=inside & (dim < DIM), other=0.0)
        tl.store(y + dim, tl.where(known, copied, float("nan")), mask=inside & (dim < DIM))


def rotary(
    *, y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, start: int, batch: int, heads: int,
    length: int, dim: int, rotated: int, max_len: int, x_strides: Sequence[int], y_strides: Sequence[int],
    interleaved: bool, inverse: bool, dtype: int, table_dtype: int,
) -> None:  # fmt: skip
    rows = batch * heads * length
    pairs, rest = triton.next_power_of_2(max(rotated // 2, 1)), triton.next_power_of_2(max(dim - rotated, 1))
    height = max(TILE // max(pairs, rest), 1)
    launch(
        rotary_kernel, (triton.cdiv(rows, height),), y, x, cos, sin, starts, rows, heads, length, start, max_len,
        *y_strides, *x_strides, configs=one_config(ROWS=height, PAIRS=pairs, REST=rest), fp_fusion=False, DIM=dim,
        ROTATED=rotated, INTERLEAVED=interleaved, INVERSE=inverse,
    )  # fmt: skip
