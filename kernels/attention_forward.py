"""attention_forward: out = dropped(softmax(score(scale Q K^T))) V and the log-sum-exp of every query; FlashAttention-2
(Dao, 2023). csrc/fastgpt.h has the formulas, the options and where things lie; docs/ops/attention.md the figures.

Shapes: B batch, T queries, S keys, H heads, Hkv key/value heads, D and Dv head dims.
Flops: 4 B H T S D, half of it when causal. Bytes: Q and out once, K and V once per tile of rows (from L2 but for the
first time).

One program per tile of rows and key/value head. A row is a query of one query head of the group, so that few queries
of many heads fill a tile and its keys are read once for all of them. It goes over the tiles of keys that its band
meets, in up to three loops: those that the band's left side cuts, those that every row sees, which need no mask, and
those that its right side or the end of the keys cuts. Where an option looks at every score, there is but the last loop.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float32
from triton.backends.compiler import GPUTarget

from fastgpt.kernels.attention_core import (
    LOG2E,
    MAX_LENGTH,
    MIN_TILE,
    Tiles,
    biased,
    capped,
    described_tile,
    dropout_scale,
    end_key_of,
    exponential,
    finished,
    finite_or_zero,
    first_key_of,
    has_copy_engine,
    limit,
    load_tile,
    sees,
    sequence_of,
    store_tile,
    tile_width,
    unit_of,
)
from fastgpt.kernels.attention_decode import (
    NO_PIECES,
    decode_configs,
    pieces_of,
    split_length,
    splits_keys,
    sum_pieces,
)
from fastgpt.kernels.core import dropout_values
from fastgpt.kernels.launch import Configs, launch

STRETCH = tl.constexpr(16)  # products of floats that are summed in a row; then the sums are

# What changes from call to call is compiled for once.
_NUMBERS = [
    *("kv_heads", "queries", "keys", "dim", "value_dim", "table_stride", "page_size"),
    *(f"{x}_{stride}" for x in ["out", "q", "k", "v"] for stride in ("batch", "head", "row")),
    *("lse_batch", "lse_head", "mask_batch", "mask_head", "mask_row", "alibi_batch"),
    *("left", "right", "dropout_threshold", "splits", "split_count", "split_least"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def attention_forward_kernel(
    out, lse, q, k, v, k_tiles, v_tiles, mask, sinks, alibi, dropout_seed, cu_seqlens_q, cu_seqlens_k, cache_seqlens,
    block_table, kv_heads, group, queries, keys, dim, value_dim, out_batch, out_head, out_row, q_batch, q_head, q_row,
    k_batch, k_head, k_row, v_batch, v_head, v_row, lse_batch, lse_head, mask_batch, mask_head, mask_row, mask_key,
    alibi_batch, table_stride, page_size, left, right, dropout_threshold, dropout_factor, scale, softcap,
    part_o, part_m, part_l, splits, split_count, split_least,
    BOTTOM_RIGHT: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """None for what a call has not; strides of q, k, v and out and head dims in units of UNIT elements. TMA: keys and
    values come by the descriptors ``k_tiles`` and ``v_tiles``."""
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32
    # Whether the band is all that a score's mask depends on.
    PLAIN: tl.constexpr = (
        mask is None and alibi is None and softcap is None and dropout_seed is None and block_table is None
    )
    # The few tiles of a piece are worth but one loop.
    WHOLE: tl.constexpr = PLAIN and splits is None
    # Scores are held in units in which exp is cheap: base 2 for the 16-bit types, whose P is rounded anyway; natural
    # for float32, where the product with log2(e) would be one rounding more.
    SCORE_UNIT: tl.constexpr = LOG2E if HALF else 1.0

    tiles = tl.cdiv(queries * group, ROWS)
    program = tl.program_id(0)
    if splits is not None:
        piece = program % splits
        program = program // splits
    head_index = program // tiles
    tile = tiles - 1 - program % tiles  # causal: the longest first
    batch, kv_head = (head_index // kv_heads).to(tl.int64), head_index % kv_heads
    queries, keys, first_query, first_key = sequence_of(cu_seqlens_q, cu_seqlens_k, batch, queries, keys)
    if cache_seqlens is not None:
        keys = tl.maximum(tl.minimum(tl.load(cache_seqlens + batch), keys), 0)
    shift = keys - queries if BOTTOM_RIGHT else 0
    rows, first_row = queries * group, tile * ROWS
    if first_row >= rows:
        return

    # Rows past the end are the last one again, so that whatever they look up is there; they are not written.
    row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1)
    query, head = row // group, kv_head * group + row % group
    last_query = (tl.minimum(first_row + ROWS, rows) - 1) // group
    # Seen by some row: [begin, end); by all: [whole_begin, whole_end).
    first = first_row // group
    begin = first_key_of(first, shift, left) // KEYS * KEYS
    end = end_key_of(last_query, shift, right, keys)
    if splits is not None:
        length = split_length(keys, split_count, split_least)
        begin = tl.maximum(begin, piece * length)
        end = tl.minimum(end, (piece + 1) * length)
    if part_o is not None and begin >= end:  # the sum of the pieces leaves it out
        return
    if WHOLE:
        whole_begin = tl.cdiv(first_key_of(last_query, shift, left), KEYS) * KEYS
        whole_end = tl.maximum(end_key_of(first, shift, right, keys) // KEYS * KEYS, whole_begin)
    else:
        whole_begin, whole_end = begin, begin

    columns, value_columns = tl.arange(0, D), tl.arange(0, DV)
    dim = None if dim is None else dim * UNIT
    value_dim = None if value_dim is None else value_dim * UNIT
    q_rows = q + batch * q_batch * UNIT + head.to(tl.int64) * q_head * UNIT + (first_query + query) * q_row * UNIT
    q_tile = load_tile(q_rows, None, columns, dim) if HALF else None
    k += tl.cast(kv_head, tl.int64) * k_head * UNIT
    v += tl.cast(kv_head, tl.int64) * v_head * UNIT
    if block_table is None:
        k += batch * k_batch * UNIT + first_key * k_row * UNIT
        v += batch * v_batch * UNIT + first_key * v_row * UNIT
    slope = None if alibi is None else tl.load(alibi + batch * alibi_batch + head)[:, None]
    if mask is not None:
        mask += (batch * mask_batch + head.to(tl.int64) * mask_head + query.to(tl.int64) * mask_row)[:, None]
    if dropout_seed is not None:
        seed, dropout_head = tl.load(dropout_seed), (batch * kv_heads * group + head)[:, None]

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)  # noqa: E741
    o = tl.zeros((ROWS, DV), tl.float32)
    for part in tl.static_range(0 if left is not None and WHOLE else 1 if WHOLE else 2, 3):
        start = begin if part == 0 else whole_begin if part == 1 else whole_end
        stop = tl.minimum(whole_begin, end) if part == 0 else whole_end if part == 1 else end
        for first_of_tile in range(start, stop, KEYS):
            key = first_of_tile + tl.arange(0, KEYS)
            there = None if part == 1 else key < keys
            if block_table is None:
                k_rows, v_rows = k + key.to(tl.int64) * k_row * UNIT, v + key.to(tl.int64) * v_row * UNIT
            else:
                page = tl.load(block_table + batch * table_stride + key // page_size, mask=there, other=0)
                row_of_page = (key % page_size).to(tl.int64)
                k_rows = k + page.to(tl.int64) * k_batch * UNIT + row_of_page * k_row * UNIT
                v_rows = v + page.to(tl.int64) * v_batch * UNIT + row_of_page * v_row * UNIT
            if HALF:
                if TMA:
                    k_tile = described_tile(k_tiles, batch, kv_head, first_of_tile)
                else:
                    k_tile = load_tile(k_rows, there, columns, dim)
                s = tl.dot(q_tile, tl.trans(k_tile))
                s *= scale * SCORE_UNIT if PLAIN else scale
            else:
                s = _scaled_product(scale, q_rows, k_rows, there, dim, D)
            if part != 1 or not PLAIN:
                seen = sees(query[:, None], key[None, :], shift, left, right, keys)
            if PLAIN:
                if part != 1:
                    s = tl.where(seen, s, float("-inf"))
            else:
                s = capped(s, softcap)
                s = biased(s, seen, query[:, None], key[None, :], keys - queries, slope, mask, mask_key) * SCORE_UNIT

            most = tl.maximum(m, tl.max(s, 1))
            base = most if part == 1 else finite_or_zero(most)
            p = exponential(s - base[:, None], HALF)
            shrink = exponential(m - base, HALF)
            m = most
            l = l * shrink + tl.sum(p, 1)  # noqa: E741
            if dropout_seed is not None:
                numbers = dropout_values(seed, dropout_head, query, first_of_tile, KEYS)
                p = tl.where(numbers >= dropout_threshold, p, 0.0)
            if TMA:
                v_tile = described_tile(v_tiles, batch, kv_head, first_of_tile)
            else:
                v_tile = load_tile(v_rows, there, value_columns, value_dim)
            o = tl.dot(p.to(v_tile.dtype), v_tile, o * shrink[:, None], input_precision="ieee")

    inside = first_row + tl.arange(0, ROWS) < rows
    if part_o is not None:
        part = ((batch * kv_heads + kv_head) * rows + row) * splits + piece
        store_tile(part_o + part * DV, inside, value_columns, None, o)
        tl.store(part_m + part, m, mask=inside)
        tl.store(part_l + part, l, mask=inside)
    else:
        o, value = finished(o, m, l, sinks, head, dropout_factor, HALF)
        out_rows = out + batch * out_batch * UNIT + head.to(tl.int64) * out_head * UNIT
        store_tile(out_rows + (first_query + query) * out_row * UNIT, inside, value_columns, value_dim, o)
        tl.store(lse + batch * lse_batch + head.to(tl.int64) * lse_head + first_query + query, value, mask=inside)


@triton.jit
def _scaled_product(scale, q_rows, k_rows, there, dim, D: tl.constexpr):
    """scale Q K^T of float32, (rows, keys), as the backward computes it: one running sum of all columns would lose more
    than torch's GEMM does. The scale is in the loop because Triton makes one such sum of ``total += dot``."""
    total = tl.zeros((q_rows.shape[0], k_rows.shape[0]), tl.float32)
    for first in range(0, D, STRETCH):
        columns = first + tl.arange(0, STRETCH)
        q_part = load_tile(q_rows, None, columns, dim)
        k_part = load_tile(k_rows, there, columns, dim)
        total += scale * tl.dot(q_part, tl.trans(k_part), input_precision="ieee")
    return total


def attention_forward(
    *, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
    alibi: Tensor | None, dropout_seed: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    cache_seqlens: Tensor | None, block_table: Tensor | None, batch: int, heads: int, kv_heads: int, queries: int,
    keys: int, dim: int, value_dim: int, total_queries: int, total_keys: int, out_strides: Sequence[int],
    q_strides: Sequence[int], k_strides: Sequence[int], v_strides: Sequence[int], lse_strides: Sequence[int],
    mask_strides: Sequence[int], alibi_stride: int, block_table_stride: int, page_size: int, left: int, right: int,
    dropout_threshold: int, num_splits: int, scale: float, softcap: float, bottom_right: bool, dtype: int,
    mask_dtype: int, mask_bool: bool,
) -> None:  # fmt: skip
    """Fields: csrc/fastgpt.h's AttentionForward. The keys of few queries are split, see attention_decode.py."""
    group = heads // kv_heads
    # Of packed sequences a tile has the same rows whatever they are: the longest must not change its neighbours' bits.
    rows = MAX_LENGTH if cu_seqlens_q is not None else queries * group
    strides = (*out_strides, *q_strides, *k_strides, *v_strides)
    unit = unit_of((q,), (dim, value_dim, *strides))
    width, value_width = tile_width(dim), tile_width(value_dim)
    options = softcap > 0 or any(x is not None for x in (mask, alibi, dropout_seed, block_table))
    value_columns = None if value_dim == value_width else value_dim // unit
    factor = dropout_scale(dropout_threshold) if dropout_threshold else None
    bottom_right = bottom_right and (left >= 0 or right >= 0)
    split = cu_seqlens_q is None and splits_keys(queries * group, num_splits)
    pieces = pieces_of(q, batch * heads * queries, keys, value_width, num_splits) if split else NO_PIECES
    half, widest = q.dtype != float32, max(width, value_width)
    k_tiles = Tiles(k, (batch, kv_heads, keys, dim), k_strides, "KEYS", width)
    v_tiles = Tiles(v, (batch, kv_heads, keys, value_dim), v_strides, "KEYS", value_width)
    # What lies past a packed or cached sequence's end is not past the tensor's, and would be fetched.
    dense = cu_seqlens_k is None and cache_seqlens is None and block_table is None
    described = dense and k_tiles.describable() and v_tiles.describable()
    if split:
        configs = decode_configs(half, widest, rows)
    else:
        configs = _configs(half, widest, options, left >= 0, rows, described)

    def grid(constants: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(queries * group, constants["ROWS"]) * batch * kv_heads * (pieces.splits or 1),)

    launch(
        attention_forward_kernel, grid,
        out, lse, q, k, v, k_tiles, v_tiles, mask, sinks, alibi, dropout_seed if dropout_threshold else None,
        cu_seqlens_q, cu_seqlens_k, cache_seqlens, block_table,
        kv_heads, group, queries, keys, None if dim == width else dim // unit,
        value_columns, *(stride // unit for stride in strides),
        *lse_strides, *((None,) * 4 if mask is None else mask_strides), alibi_stride, block_table_stride, page_size,
        limit(left), limit(right), dropout_threshold, factor, scale, softcap if softcap > 0 else None, *pieces,
        configs=configs,
        shape_class=(q.dtype, widest, split, options, described, left >= 0, right >= 0, min(rows, 128).bit_length()),
        fp_fusion=q.dtype == float32, BOTTOM_RIGHT=bottom_right, UNIT=unit, D=width, DV=value_width,
    )  # fmt: skip
    if pieces.o is not None:
        sum_pieces(
            pieces, out, lse, sinks, cache_seqlens, batch, heads, kv_heads, queries, keys, value_columns,
            [stride // unit for stride in out_strides], lse_strides, limit(left), limit(right), factor,
            BOTTOM_RIGHT=bottom_right, UNIT=unit, DV=value_width,
        )  # fmt: skip


def _configs(half: bool, width: int, options: bool, window: bool, rows: int, described: bool) -> Configs:
    """Tiles for head dims padded to ``width``, with no more rows than there are; by descriptors where keys and values
    have any (``described``) and the architecture can use them."""
    most = max(triton.next_power_of_2(rows), MIN_TILE)

    def configs(target: GPUTarget) -> list[triton.Config]:
        tma = {"TMA": True} if described and has_copy_engine(target) else {}
        return [
            triton.Config(
                {"ROWS": min(tile_rows, most), "KEYS": tile_keys, **tma},
                num_warps=warps if tile_rows <= most else 4,
                num_stages=stages,
            )
            for tile_rows, tile_keys, warps, stages in _tiles(target, half, width, options, window)
        ]

    return configs


def _tiles(target: GPUTarget, half: bool, width: int, options: bool, window: bool) -> list[tuple[int, int, int, int]]:
    """(rows, keys, warps, stages), the preferred one first: the largest tiles whose scores and sums stay in registers
    and whose keys fit the architecture's shared memory (99 KB on 86, 89 and 120, 163 on 80, 227 on 90 and 100)."""
    size = 0 if width <= 64 else 1 if width <= 128 else 2
    if target.backend == "hip":  # 64 KB
        return [(64, 64, 4, 1), (64, 32, 4, 1)] if size < 2 and half else [(32, 32, 4, 1)]
    if not half:
        return [(64, 32, 8, 2), (32, 32, 4, 2)] if size == 0 else [(64, 32, 8, 2)] if size == 1 else [(32, 16, 4, 2)]
    if options:  # what they look up takes registers
        return [[(64, 64, 4, 2)], [(64, 32, 8, 2)], [(64, 16, 8, 2)]][size]
    if target.arch in (100, 103):
        return [[(128, 128, 8, 2)], [(128, 128, 8, 2)], [(64, 64, 8, 2)]][size]
    if target.arch == 90:
        plain = [
            [(128, 64, 4, 3), (128, 128, 8, 2)],
            [(128, 128, 8, 2), (128, 64, 8, 3)],
            [(128, 64, 8, 2), (64, 64, 8, 2)],
        ][size]
    else:
        plain = [
            [(128, 64, 4, 3), (128, 64, 8, 3)],
            [(128, 64, 8, 3), (128, 32, 8, 3)],
            [(64, 32, 8, 2)],
        ][size]
    return plain[-1:] if window else plain  # a third loop takes registers too
