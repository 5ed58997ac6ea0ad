"""What gelu and swiglu share: how a matrix is cut into tiles, and elementary functions.

For 16-bit results (HALF) the functions take the hardware's approximate exponential and reciprocal as they are (2 ulp
each), and the argument of the exponential is not corrected: relative errors up to 1e-5, far below the rounding of the
result. float32 results cost about ten operations more.
"""

from typing import Any

import triton
import triton.language as tl

from fastgpt.kernels.launch import Configs, one_config

TILE = 4096  # elements of a program, 16 for each of 256 threads


def tile(rows: int, cols: int) -> dict[str, Any]:
    """What a program takes: pieces of 256 elements of as many rows as that leaves, or TILE elements of the only row."""
    width = min(triton.next_power_of_2(cols), 256) if rows > 1 else TILE
    return {"ROWS": TILE // width, "COLS": width}


def tiles(rows: int, cols: int) -> tuple[tuple[int], Configs]:
    """(grid, configs) for ``tile_at``."""
    size = tile(rows, cols)
    return (triton.cdiv(rows, size["ROWS"]) * triton.cdiv(cols, size["COLS"]),), one_config(**size, num_warps=8)


@triton.jit
def tile_at(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's tile: row (ROWS, 1) and col (1, COLS), both int64, and where they are inside the matrix."""
    strips = tl.cdiv(cols, COLS)
    tile = tl.program_id(0).to(tl.int64)
    row = tile // strips * ROWS + tl.arange(0, ROWS)[:, None]
    col = tile % strips * COLS + tl.arange(0, COLS)[None, :]
    return row, col, (row < rows) & (col < cols)


# Third argument of tl.maximum and tl.minimum, which may drop NaN otherwise.
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


# --- elementary functions ---


@triton.jit
def exp_negative(x, HALF: tl.constexpr, rest=0.0):
    """e^(x + rest) for x <= 0, |rest| < 0.1.

    float32: x = n ln 2 + r with ln 2 in two parts (Cody and Waite), whose products with n are exact, fused or not; so
    the exponential's argument r is small, and its rounding is not magnified. NaN stays.
    """
    if HALF:
        return tl.exp(x + rest)
    else:
        x = tl.maximum(x, -104.0, KEEP_NAN)  # below, e^x is 0
        shifted = x * 1.4426950408889634 + 12582912.0  # 1.5 * 2^23: no bits are left behind the point
        n = shifted - 12582912.0
        r = (x - n * 0.693145751953125) - n * 1.42860682030941723e-6
        # The last bits of `shifted` are n. 2^n in two factors: 2^n alone may be subnormal.
        power = ((shifted.to(tl.int32, bitcast=True) << 23) + ((127 + 64) << 23)).to(tl.float32, bitcast=True)
        return tl.exp(r + rest) * power * 5.421010862427522e-20  # 2^-64


@triton.jit
def reciprocal(x, HALF: tl.constexpr):
    """1 / x for x between 1 and 1e30."""
    r = 1.0 / x
    if not HALF:
        r += r * (1.0 - x * r)  # Newton: the approximation's 2 ulp to less than one
    return r


@triton.jit
def sigmoid(x, HALF: tl.constexpr):
    """sigmoid(x) = 1 / (1 + e^-x) and 1 - sigmoid(x), neither with cancellation or overflow: e^-|x| is at most 1."""
    e = exp_negative(-tl.abs(x), HALF)
    near_one = reciprocal(1.0 + e, HALF)
    near_zero = e * near_one
    return tl.where(x < 0.0, near_zero, near_one), tl.where(x < 0.0, near_one, near_zero)
