"""attention_forward for few queries, as when decoding with a cache: the keys are split (Flash-Decoding; Dao et al.,
2023). The pieces themselves go through attention_forward.py's kernel; here is what they are, and their sum.

Shapes: B batch, T queries, S keys, H heads, Hkv key/value heads, D and Dv head dims.
Bytes: K and V once, B Hkv S (D + Dv) elements, and what is left is small: this is bound by memory. Flops: 4 B H T S D.

With few queries there are few tiles of rows. So a program takes the rows of a key/value head and one piece of its keys:
256 of them up to 16384, then a 64th of the sequence, or what the caller asks for. It leaves o, m and l, its sums with
the maximum that they were divided by, and a second kernel adds the pieces up, a program a row. Both find out about the
pieces from the sequence's own length on the device, so that a row's bits depend neither on its neighbours nor on the
GPU; pieces that a window hides are neither read nor written. Where all sequences are but one piece, it is written at
once, with the bits of the sum of one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32
from triton.backends.compiler import GPUTarget

from fastgpt.kernels.attention_core import (
    MIN_TILE,
    end_key_of,
    exponential,
    finished,
    finite_or_zero,
    first_key_of,
    store_tile,
)
from fastgpt.kernels.launch import Configs, launch, one_config

# As in csrc/cuda/attention_forward.cuh.
SPLIT_ROWS = 64  # rows of a key/value head that count as few
SPLIT_UNIT = tl.constexpr(64)  # a piece is a multiple of this, and this of the keys of a tile
SPLIT_KEYS = 256  # the least that is worth a program of its own, unless the caller asks
MAX_SPLITS = 64  # unless the caller asks


class Pieces(NamedTuple):
    """The pieces' arguments of attention_forward_kernel. All None: nothing is split. Without ``o``, ``m`` and ``l``
    (B, Hkv, rows, splits, ...) there is one piece, which is the result."""

    o: Tensor | None
    m: Tensor | None
    l: Tensor | None  # noqa: E741
    splits: int | None  # that any sequence may have
    count: int | None  # a sequence is cut into about as many
    least: int | None  # but none of them is shorter


NO_PIECES = Pieces(None, None, None, None, None, None)


def splits_keys(rows: int, num_splits: int) -> bool:
    """Whether ``rows`` of a key/value head are few, or the caller wants their keys split. A packed batch's never are,
    because its longest sequence must not change its neighbours' bits."""
    return num_splits > 1 or rows <= SPLIT_ROWS


def pieces_of(q: Tensor, rows: int, keys: int, width: int, num_splits: int) -> Pieces:
    """For ``rows`` of the whole batch, with sequences of up to ``keys`` keys and sums of ``width`` columns."""
    count, least = (num_splits, SPLIT_UNIT.value) if num_splits else (MAX_SPLITS, SPLIT_KEYS)
    splits = max(min(triton.cdiv(keys, least), count), 1)
    if splits == 1:
        return Pieces(None, None, None, 1, count, least)
    o = q.new_empty(rows * splits * width, dtype=float32)
    m, l = (q.new_empty(rows * splits, dtype=float32) for _ in range(2))  # noqa: E741
    return Pieces(o, m, l, splits, count, least)


@triton.jit
def split_length(keys, count, least):
    """Keys of a piece of a sequence of ``keys``."""
    return tl.maximum(tl.cdiv(tl.cdiv(keys, count), SPLIT_UNIT) * SPLIT_UNIT, least)


@triton.jit(
    do_not_specialize=[
        *("kv_heads", "queries", "keys", "value_dim", "out_batch", "out_head", "out_row", "lse_batch", "lse_head"),
        *("left", "right", "splits", "split_count", "split_least"),
    ]
)
def attention_combine_kernel(
    out, lse, part_o, part_m, part_l, sinks, cache_seqlens, splits, split_count, split_least, kv_heads, group, queries,
    keys, value_dim, out_batch, out_head, out_row, lse_batch, lse_head, left, right, dropout_factor,
    BOTTOM_RIGHT: tl.constexpr, UNIT: tl.constexpr, DV: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The arguments are attention_forward_kernel's. Rows: (query, head of the group) pairs of a key/value head."""
    HALF: tl.constexpr = out.dtype.element_ty != tl.float32
    index = tl.program_id(0)
    rows = queries * group
    head_index, row = index // rows, index % rows
    batch, kv_head = (head_index // kv_heads).to(tl.int64), head_index % kv_heads
    query, head = row // group, kv_head * group + row % group
    if cache_seqlens is not None:
        keys = tl.maximum(tl.minimum(tl.load(cache_seqlens + batch), keys), 0)
    shift = keys - queries if BOTTOM_RIGHT else 0
    length = split_length(keys, split_count, split_least)
    first_key, end_key = first_key_of(query, shift, left), end_key_of(query, shift, right, keys)
    begin, end = first_key // length, tl.where(first_key < end_key, tl.cdiv(end_key, length), 0)

    # Two dimensions throughout: (pieces, columns).
    first = tl.cast(index, tl.int64) * splits
    m = tl.full((1, 1), float("-inf"), tl.float32)
    for piece in range(begin, end, PIECES):
        pieces = piece + tl.arange(0, PIECES)[:, None]
        m_of_pieces = tl.load(part_m + first + pieces, mask=pieces < end, other=float("-inf"))
        m = tl.maximum(m, tl.max(m_of_pieces, 0, keep_dims=True))
    base = finite_or_zero(m)
    l = tl.zeros((1, 1), tl.float32)  # noqa: E741
    o = tl.zeros((1, DV), tl.float32)
    columns = tl.arange(0, DV)
    for piece in range(begin, end, PIECES):
        pieces = piece + tl.arange(0, PIECES)[:, None]
        there = pieces < end
        m_of_pieces = tl.load(part_m + first + pieces, mask=there, other=float("-inf"))
        weight = exponential(m_of_pieces - base, HALF)
        l_of_pieces = tl.load(part_l + first + pieces, mask=there, other=0.0)
        l += tl.sum(l_of_pieces * weight, 0, keep_dims=True)  # noqa: E741
        o_of_pieces = tl.load(part_o + (first + pieces) * DV + columns[None, :], mask=there, other=0.0)
        o += tl.sum(o_of_pieces * weight, 0, keep_dims=True)

    one = tl.arange(0, 1)
    o, value = finished(o, tl.reshape(m, (1,)), tl.reshape(l, (1,)), sinks, head + one, dropout_factor, HALF)
    out_row_of = out + batch * out_batch * UNIT + tl.cast(head, tl.int64) * out_head * UNIT
    out_row_of += tl.cast(query, tl.int64) * out_row * UNIT
    store_tile(out_row_of + one, one == 0, columns, None if value_dim is None else value_dim * UNIT, o)
    tl.store(lse + batch * lse_batch + tl.cast(head, tl.int64) * lse_head + query + one, value)


def sum_pieces(
    pieces: Pieces, out: Tensor, lse: Tensor, sinks: Tensor | None, cache_seqlens: Tensor | None, batch: int,
    heads: int, kv_heads: int, queries: int, keys: int, value_dim: int | None, out_strides: Sequence[int],
    lse_strides: Sequence[int], left: int | None, right: int | None, dropout_factor: float | None, *,
    BOTTOM_RIGHT: bool, UNIT: int, DV: int,
) -> None:  # fmt: skip
    """``out`` and ``lse`` from their pieces; the arguments are attention_forward_kernel's."""
    launch(
        attention_combine_kernel, (batch * heads * queries,),
        out, lse, pieces.o, pieces.m, pieces.l, sinks, cache_seqlens, pieces.splits, pieces.count, pieces.least,
        kv_heads, heads // kv_heads, queries, keys, value_dim, *out_strides, *lse_strides, left, right, dropout_factor,
        configs=one_config(PIECES=32), fp_fusion=out.dtype == float32, BOTTOM_RIGHT=BOTTOM_RIGHT, UNIT=UNIT, DV=DV,
    )  # fmt: skip


def decode_configs(half: bool, width: int, rows: int) -> Configs:
    """One tile for head dims padded to ``width``: as many rows of a head as registers hold, up to 64, against keys that
    come up to three tiles ahead."""
    if half:
        most, keys, warps, stages = (64, 64, 4, 3) if width <= 128 else (16, 32, 4, 3)
    else:
        most, keys, warps, stages = (16, 32, 4, 2) if width <= 128 else (16, 16, 8, 2)
    tile_rows = max(triton.next_power_of_2(min(rows, most)), MIN_TILE)

    def configs(target: GPUTarget) -> list[triton.Config]:
        ahead = 1 if target.backend == "hip" else stages  # 64 KB of shared memory
        of_tile = 8 if tile_rows > MIN_TILE else warps
        return [triton.Config({"ROWS": tile_rows, "KEYS": keys}, num_warps=of_tile, num_stages=ahead)]

    return configs
