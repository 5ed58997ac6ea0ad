"""attention, backward, from the inputs, the output and the log-sum-exp (FlashAttention-2, Dao, 2023, algorithm 2).

    P = exp(scale Q K^T + bias - lse),  dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O),  dS = P * (dP - delta),
    dQ = scale dS K,  dK = scale dS^T Q,  dsink = -sum(exp(sink - lse) * delta);  options: see csrc/fastgpt.h

B batch, T queries, S keys, H heads, Hkv key/value heads, D and Dv head dims. Three launches:

  1. delta, and each program's share of dsinks.
  2. dK and dV: a program owns a tile of keys and streams the tiles of queries that see them, of every query head of the
     group in turn. Scores are computed transposed, so that P^T and dS^T are left operands as they lie.
  3. dQ: a program owns a tile of queries and streams the tiles of keys that they see.

So no two programs add to one element: no atomics, no workspace but delta, the same result in every run. The price is
that P and dP are computed in 2 and in 3: seven products (14 T S D flops a head) instead of five. Bytes: Q, K, V, O, dO
read and dQ, dK, dV written once each from and to memory; tiles that are streamed come from the L2 cache.

A stream has up to three parts: tiles that the band cuts at its beginning, tiles that it does not cut, which need no
mask, and those that it cuts at its end.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastgpt.kernels.attention_core import (
    LOG2E,
    Tiles,
    biased,
    described_tile,
    dropout_scale,
    end_key_of,
    end_query_of,
    first_key_of,
    first_query_of,
    has_copy_engine,
    limit,
    load_tile,
    sees,
    sequence_of,
    store_tile,
    tile_width,
    unit_of,
)
from fastgpt.kernels.core import dropout_values, tanh
from fastgpt.kernels.launch import Configs, launch, one_config

_DELTA_ROWS = 64
_STRETCH = 16  # products of floats that are summed in a row


# --- what the kernels share ---


@triton.jit
def _place(blocks, heads):
    """(block of the head, head, batch row) of this program; the last two are int64."""
    program = tl.program_id(0)
    of_head = (program // blocks).to(tl.int64)
    return program % blocks, of_head % heads, of_head // heads


@triton.jit
def _rows(tensor, strides, unit, batch, head, row):
    """Pointers to rows of a tensor; ``strides`` are of batch, head and row, in units of ``unit`` elements."""
    return tensor + (batch * strides[0] + head * strides[1]) * unit + row * (strides[2] * unit)


@triton.jit
def _mask_rows(mask, strides, batch, head, query):
    """Pointers to mask(b, h, i, 0)."""
    return None if mask is None else mask + batch * strides[0] + head * strides[1] + query.to(tl.int64) * strides[2]


@triton.jit
def _kept(seed, head, query, first_key, threshold, KEYS: tl.constexpr):
    """Whether dropout keeps the weights of a tile, (queries, keys)."""
    if seed is None:
        kept = None
    else:
        kept = dropout_values(tl.load(seed), head, query, first_key, KEYS) >= threshold
    return kept


@triton.jit
def _width(dim, unit):
    return None if dim is None else dim * unit


@triton.jit
def _own_tile(rows, there, columns, dim, STRETCH: tl.constexpr):
    """What a program holds of its own rows: all; of float32 nothing, for which there are no registers."""
    return load_tile(rows, there, columns, dim) if STRETCH is None else None


@triton.jit
def _product(
    factor, own, own_rows, own_there, stream, stream_rows, stream_there, dim, WIDTH: tl.constexpr, STRETCH: tl.constexpr
):
    """factor own stream^T, (own rows, stream rows). Of float32 STRETCH columns are summed in a row, and then the sums
    are: one running sum loses more than torch's GEMM does."""
    if STRETCH is None:
        total = factor * tl.dot(own, tl.trans(stream))
    else:
        total = tl.zeros((own_rows.shape[0], stream_rows.shape[0]), tl.float32)
        for first in range(0, WIDTH, STRETCH):
            columns = first + tl.arange(0, STRETCH)
            a = load_tile(own_rows, own_there, columns, dim)
            b = load_tile(stream_rows, stream_there, columns, dim)
            total += factor * tl.dot(a, tl.trans(b), input_precision="ieee")
    return total


@triton.jit
def _add_product(total, factor, weights, stream, STRETCH: tl.constexpr):
    """total + factor weights stream, where the factor of 16-bit types waits for ``_times``."""
    if STRETCH is None:
        total = tl.dot(weights.to(stream.dtype), stream, total)
    else:
        total += factor * tl.dot(weights, stream, input_precision="ieee")
    return total


@triton.jit
def _times(total, factor, STRETCH: tl.constexpr):
    return total * factor if STRETCH is None else total


@triton.jit
def _log_sum_exp(lse):
    """+inf for a query that sees nothing, whichever infinity the forward left: its weights are then zero."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _exponential(x):
    """exp(x) of float32: 2^n exp(r), r = x - n ln 2, |r| < 0.35. exp2(x log2 e) would round its argument at its size,
    which is most of the error of a float32 P."""
    x = tl.where(x < -150.0, -150.0, x)  # exp of it is zero; -inf would make r NaN
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, n times the first is exact
    return tl.exp2(n) * tl.exp2(r * LOG2E)


@triton.jit
def _weights(
    s, dp, query, key, shift, left, right, queries, keys, lse, delta, softcap, slope, mask, mask_strides, kept,
    MASKED: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """(P as dropout leaves it, dS) from scale Q K^T and dropout's scale times dP; the scale of P waits for the end."""
    derivative = None
    if softcap is not None:
        t = tanh(s / softcap)
        s = softcap * t
        derivative = 1 - t * t  # rounds less than from the capped score
    if MASKED:
        seen = sees(query, key, shift, left, right, keys) & (query < queries)
        s = biased(s, seen, query, key, keys - queries, slope, mask, mask_strides[3])
    # The difference first: lse log2 e alone would round at the size of lse.
    p = tl.exp2((s - lse) * LOG2E) if STRETCH is None else _exponential(s - lse)
    if kept is not None:
        dp = tl.where(kept, dp, 0.0)
    ds = p * (dp - delta)
    if derivative is not None:
        ds *= derivative
    if kept is not None:
        p = tl.where(kept, p, 0.0)
    return p, ds


# --- delta ---


@triton.jit(do_not_specialize=["queries", "blocks", "value_dim", "dout_strides", "out_strides", "lse_strides"])
def attention_delta_kernel(
    delta, sink_shares, dout, out, lse, sinks, cu_seqlens_q, heads, queries, blocks, value_dim,
    dout_strides, out_strides, lse_strides, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    STRETCH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta of ROWS queries, as the diagonal of dO O^T in the very products and additions that give dP: where a query
    sees one key, O is that key's V, and dP - delta is exactly zero."""
    block, head, batch = _place(blocks, heads)
    queries, _, first_query, _ = sequence_of(cu_seqlens_q, None, batch, queries, 0)
    row, columns, dim = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), _width(value_dim, UNIT)
    there, at = row < queries, first_query + row
    out_rows = _rows(out, out_strides, UNIT, batch, head, at)
    dout_rows = _rows(dout, dout_strides, UNIT, batch, head, at)
    o = _own_tile(out_rows, there, columns, dim, STRETCH)
    do = _own_tile(dout_rows, there, columns, dim, STRETCH)
    products = _product(1.0, do, dout_rows, there, o, out_rows, there, dim, WIDTH, STRETCH)
    diagonal = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    sums = tl.sum(tl.where(diagonal, products, 0.0), 1)
    stat = batch * lse_strides[0] + head * lse_strides[1] + at
    tl.store(delta + stat, sums, mask=there)
    if sinks is not None:
        row_lse = _log_sum_exp(tl.load(lse + stat, mask=there, other=float("inf")))
        share = tl.exp2((tl.load(sinks + head) - row_lse) * LOG2E) * sums
        tl.store(sink_shares + tl.program_id(0), tl.sum(tl.where(there, share, 0.0)))


# --- gradients ---

# What changes from call to call is compiled for once.
_NUMBERS = [
    *("heads", "kv_heads", "queries", "keys", "dim", "value_dim", "alibi_stride", "left", "right", "threshold"),
    *(f"{x}_strides" for x in ("dq", "dk", "dv", "dout", "q", "k", "v", "lse")),
]


@triton.jit(do_not_specialize=_NUMBERS)
def attention_backward_keys_kernel(
    dk, dv, q_tiles, dout_tiles, dout, lse, delta, q, k, v, mask, alibi, seed, cu_seqlens_q, cu_seqlens_k, heads,
    kv_heads, queries, keys, dim, value_dim, dk_strides, dv_strides, dout_strides, q_strides, k_strides, v_strides,
    lse_strides, mask_strides, alibi_stride, left, right, threshold, scale, softcap, kept_scale,
    BOTTOM_RIGHT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    STRETCH: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr, TMA: tl.constexpr = False,
):  # fmt: skip
    """dK and dV of OWN keys, from tiles of STREAM queries; scores are transposed, (keys, queries)."""
    # Whether the band is all that a score's mask depends on.
    PLAIN: tl.constexpr = mask is None and alibi is None and seed is None
    block, kv_head, batch = _place(tl.cdiv(keys, OWN), kv_heads)
    queries, keys, first_query, first_key = sequence_of(cu_seqlens_q, cu_seqlens_k, batch, queries, keys)
    own = block * OWN  # causal: the first have the most work
    if own >= keys:
        return
    shift = keys - queries if BOTTOM_RIGHT else 0
    group = heads // kv_heads
    key = own + tl.arange(0, OWN)
    own_there = key < keys
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    dim, value_dim = _width(dim, UNIT), _width(value_dim, UNIT)
    k_rows = _rows(k, k_strides, UNIT, batch, kv_head, first_key + key)
    v_rows = _rows(v, v_strides, UNIT, batch, kv_head, first_key + key)
    own_k = _own_tile(k_rows, own_there, columns, dim, STRETCH)
    own_v = _own_tile(v_rows, own_there, value_columns, value_dim, STRETCH)
    k_sums = tl.zeros((OWN, WIDTH), tl.float32)
    v_sums = tl.zeros((OWN, VALUE_WIDTH), tl.float32)

    # The queries that see some of the keys are [begin, end), those that see all [whole_begin, whole_end). Those past
    # the last one have weights of zero, by their lse.
    last = tl.minimum(own + OWN, keys) - 1
    begin = first_query_of(own, shift, right) // STREAM * STREAM
    end = end_query_of(last, shift, left, queries)
    if PLAIN:
        whole_begin = tl.cdiv(first_query_of(last, shift, right), STREAM) * STREAM
        whole_end = end if left is None else end_query_of(own, shift, left, queries) // STREAM * STREAM
        whole_end = tl.maximum(whole_end, whole_begin)
    else:
        whole_begin, whole_end = begin, begin
    for h in range(group):
        head = kv_head * group + h
        stats = batch * lse_strides[0] + head * lse_strides[1] + first_query
        slope = None if alibi is None else tl.load(alibi + batch * alibi_stride + head)
        for part in tl.static_range(2 if not PLAIN else 1 if right is None else 0, 2 if PLAIN and left is None else 3):
            start = begin if part == 0 else whole_begin if part == 1 else whole_end
            stop = tl.minimum(whole_begin, end) if part == 0 else whole_end if part == 1 else end
            for at in range(start, stop, STREAM):
                query = at + tl.arange(0, STREAM)
                there = query < queries
                q_rows = _rows(q, q_strides, UNIT, batch, head, first_query + query)
                dout_rows = _rows(dout, dout_strides, UNIT, batch, head, first_query + query)
                if TMA:
                    q_tile = described_tile(q_tiles, batch, head, at)
                    dout_tile = described_tile(dout_tiles, batch, head, at)
                else:
                    q_tile = load_tile(q_rows, there, columns, dim)
                    dout_tile = load_tile(dout_rows, there, value_columns, value_dim)
                row_lse = _log_sum_exp(tl.load(lse + stats + query, mask=there, other=float("inf")))
                row_delta = tl.load(delta + stats + query, mask=there, other=0.0)
                s = _product(scale, own_k, k_rows, own_there, q_tile, q_rows, there, dim, WIDTH, STRETCH)
                dp = _product(
                    kept_scale, own_v, v_rows, own_there, dout_tile, dout_rows, there, value_dim, VALUE_WIDTH, STRETCH
                )
                kept = _kept(seed, batch * heads + head, query, own, threshold, OWN)
                kept = None if kept is None else tl.trans(kept)
                mask_rows = _mask_rows(mask, mask_strides, batch, head, query[None, :])
                p, ds = _weights(
                    s, dp, query[None, :], key[:, None], shift, left, right, queries, keys, row_lse[None, :],
                    row_delta[None, :], softcap, slope, mask_rows, mask_strides, kept, part != 1, STRETCH,
                )  # fmt: skip
                v_sums = _add_product(v_sums, kept_scale, p, dout_tile, STRETCH)
                k_sums = _add_product(k_sums, scale, ds, q_tile, STRETCH)
    dk_rows = _rows(dk, dk_strides, UNIT, batch, kv_head, first_key + key)
    dv_rows = _rows(dv, dv_strides, UNIT, batch, kv_head, first_key + key)
    store_tile(dk_rows, own_there, columns, dim, _times(k_sums, scale, STRETCH))
    store_tile(dv_rows, own_there, value_columns, value_dim, _times(v_sums, kept_scale, STRETCH))


@triton.jit(do_not_specialize=_NUMBERS)
def attention_backward_queries_kernel(
    dq, k_tiles, v_tiles, dout, lse, delta, q, k, v, mask, alibi, seed, cu_seqlens_q, cu_seqlens_k, heads, kv_heads,
    queries, keys, dim, value_dim, dq_strides, dout_strides, q_strides, k_strides, v_strides, lse_strides, mask_strides,
    alibi_stride, left, right, threshold, scale, softcap, kept_scale, BOTTOM_RIGHT: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, STRETCH: tl.constexpr, OWN: tl.constexpr, STREAM: tl.constexpr,
    TMA: tl.constexpr = False,
):  # fmt: skip
    """dQ of OWN queries, from tiles of STREAM keys."""
    PLAIN: tl.constexpr = mask is None and alibi is None and seed is None
    blocks = tl.cdiv(queries, OWN)
    block, head, batch = _place(blocks, heads)
    queries, keys, first_query, first_key = sequence_of(cu_seqlens_q, cu_seqlens_k, batch, queries, keys)
    own = (blocks - 1 - block) * OWN  # causal: the last have the most work
    if own >= queries:
        return
    shift = keys - queries if BOTTOM_RIGHT else 0
    kv_head = head // (heads // kv_heads)
    query = own + tl.arange(0, OWN)
    own_there = query < queries
    columns, value_columns = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    dim, value_dim = _width(dim, UNIT), _width(value_dim, UNIT)
    q_rows = _rows(q, q_strides, UNIT, batch, head, first_query + query)
    dout_rows = _rows(dout, dout_strides, UNIT, batch, head, first_query + query)
    own_q = _own_tile(q_rows, own_there, columns, dim, STRETCH)
    own_dout = _own_tile(dout_rows, own_there, value_columns, value_dim, STRETCH)
    stats = batch * lse_strides[0] + head * lse_strides[1] + first_query + query
    row_lse = _log_sum_exp(tl.load(lse + stats, mask=own_there, other=float("inf")))
    row_delta = tl.load(delta + stats, mask=own_there, other=0.0)
    slope = None if alibi is None else tl.load(alibi + batch * alibi_stride + head)
    mask_rows = _mask_rows(mask, mask_strides, batch, head, query[:, None])
    sums = tl.zeros((OWN, WIDTH), tl.float32)

    # The keys that some of the queries see are [begin, end), those that all see [whole_begin, whole_end).
    last = tl.minimum(own + OWN, queries) - 1
    begin = first_key_of(own, shift, left) // STREAM * STREAM
    end = end_key_of(last, shift, right, keys)
    if PLAIN:
        whole_begin = tl.cdiv(first_key_of(last, shift, left), STREAM) * STREAM
        whole_end = tl.maximum(end_key_of(own, shift, right, keys) // STREAM * STREAM, whole_begin)
    else:
        whole_begin, whole_end = begin, begin
    for part in tl.static_range(2 if not PLAIN else 1 if left is None else 0, 3):
        start = begin if part == 0 else whole_begin if part == 1 else whole_end
        stop = tl.minimum(whole_begin, end) if part == 0 else whole_end if part == 1 else end
        for at in range(start, stop, STREAM):
            key = at + tl.arange(0, STREAM)
            there = None if part == 1 else key < keys
            k_rows = _rows(k, k_strides, UNIT, batch, kv_head, first_key + key)
            v_rows = _rows(v, v_strides, UNIT, batch, kv_head, first_key + key)
            if TMA:
                k_tile = described_tile(k_tiles, batch, kv_head, at)
                v_tile = described_tile(v_tiles, batch, kv_head, at)
            else:
                k_tile = load_tile(k_rows, there, columns, dim)
                v_tile = _own_tile(v_rows, there, value_columns, value_dim, STRETCH)
            s = _product(scale, own_q, q_rows, own_there, k_tile, k_rows, there, dim, WIDTH, STRETCH)
            dp = _product(
                kept_scale, own_dout, dout_rows, own_there, v_tile, v_rows, there, value_dim, VALUE_WIDTH, STRETCH
            )
            kept = _kept(seed, batch * heads + head, query, at, threshold, STREAM)
            _, ds = _weights(
                s, dp, query[:, None], key[None, :], shift, left, right, queries, keys, row_lse[:, None],
                row_delta[:, None], softcap, slope, mask_rows, mask_strides, kept, part != 1, STRETCH,
            )  # fmt: skip
            sums = _add_product(sums, scale, ds, k_tile, STRETCH)
    dq_rows = _rows(dq, dq_strides, UNIT, batch, head, first_query + query)
    store_tile(dq_rows, own_there, columns, dim, _times(sums, scale, STRETCH))


# --- the call ---


def attention_backward(
    *, dq: Tensor, dk: Tensor, dv: Tensor, dsinks: Tensor | None, dout: Tensor, out: Tensor, lse: Tensor, q: Tensor,
    k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, alibi: Tensor | None,
    dropout_seed: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, batch: int, heads: int,
    kv_heads: int, queries: int, keys: int, dim: int, value_dim: int, total_queries: int, total_keys: int,
    dq_strides: Sequence[int], dk_strides: Sequence[int], dv_strides: Sequence[int], dout_strides: Sequence[int],
    out_strides: Sequence[int], q_strides: Sequence[int], k_strides: Sequence[int], v_strides: Sequence[int],
    lse_strides: Sequence[int], mask_strides: Sequence[int], alibi_stride: int, left: int, right: int,
    dropout_threshold: int, scale: float, softcap: float, bottom_right: bool, dtype: int, mask_dtype: int,
    mask_bool: bool,
) -> None:  # fmt: skip
    """Fields: csrc/fastgpt.h's AttentionBackward. ``out`` and ``lse`` are a forward's, of any backend."""
    strides = (dq_strides, dk_strides, dv_strides, dout_strides, out_strides, q_strides, k_strides, v_strides)
    unit = unit_of((q,), (dim, value_dim, *(n for three in strides for n in three)))
    dqs, dks, dvs, dos, os, qs, ks, vs = (tuple(n // unit for n in three) for three in strides)
    lse_strides, mask_strides = tuple(lse_strides), tuple(mask_strides)
    width, value_width = tile_width(dim), tile_width(value_dim)
    in_units = [None if n == tile else n // unit for n, tile in ((dim, width), (value_dim, value_width))]
    stretch = _STRETCH if q.dtype == torch.float32 else None
    delta = torch.empty_like(lse)

    blocks = triton.cdiv(queries, _DELTA_ROWS)
    shares = None if sinks is None else delta.new_empty(batch, heads, blocks)
    launch(
        attention_delta_kernel, (blocks * heads * batch,), delta, shares, dout, out, lse, sinks, cu_seqlens_q, heads,
        queries, blocks, in_units[1], dos, os, lse_strides,
        configs=one_config(num_warps=4 if stretch is None else 8, num_stages=1), UNIT=unit, WIDTH=value_width,
        STRETCH=stretch, ROWS=_DELTA_ROWS,
    )  # fmt: skip
    if shares is not None:
        torch.neg(shares.sum((0, 2)), out=dsinks)

    tensors = (dout, lse, delta, q, k, v, mask, alibi, dropout_seed if dropout_threshold else None)
    sizes = (cu_seqlens_q, cu_seqlens_k, heads, kv_heads, queries, keys, *in_units)
    options = (
        dos, qs, ks, vs, lse_strides, mask_strides, alibi_stride, limit(left), limit(right), dropout_threshold, scale,
        softcap if softcap > 0 else None, dropout_scale(dropout_threshold),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "BOTTOM_RIGHT": bottom_right and (left >= 0 or right >= 0),
        "UNIT": unit,
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "STRETCH": stretch,
    }

    plain = mask is None and alibi is None and not dropout_threshold
    packed, widest = cu_seqlens_q is not None, max(width, value_width)
    shape_class = (str(q.dtype), widest, plain, left >= 0, right >= 0)

    def gradients(
        kernel: Any, rows: int, row_heads: int, results: Sequence[Tensor], result_strides: Any, *stream: Tiles
    ) -> None:
        # What lies past a packed sequence's end is not past the tensor's, and would be fetched.
        described = not packed and all(tiles.describable() for tiles in stream)
        launch(
            kernel, lambda constants: (triton.cdiv(rows, constants["OWN"]) * row_heads * batch,), *results, *stream,
            *tensors, *sizes, *result_strides, *options, shape_class=(*shape_class, described),
            configs=_configs(len(results) == 2, q.dtype, widest, not plain, left >= 0, packed, described), **constants,
        )  # fmt: skip

    gradients(
        attention_backward_keys_kernel, keys, kv_heads, (dk, dv), (dks, dvs),
        Tiles(q, (batch, heads, queries, dim), q_strides, "STREAM", width),
        Tiles(dout, (batch, heads, queries, value_dim), dout_strides, "STREAM", value_width),
    )  # fmt: skip
    gradients(
        attention_backward_queries_kernel, queries, heads, (dq,), (dqs,),
        Tiles(k, (batch, kv_heads, keys, dim), k_strides, "STREAM", width),
        Tiles(v, (batch, kv_heads, keys, value_dim), v_strides, "STREAM", value_width),
    )  # fmt: skip


def _configs(
    own_keys: bool, dtype: torch.dtype, width: int, options: bool, window: bool, packed: bool, described: bool
) -> Configs:
    """Own rows, rows of a tile of the stream, warps and stages, for head dims padded to ``width``. Registers decide:
    two sums, each of own rows x width, stay in them where keys are owned; what options and packed sequences look up
    takes some as well, and so does a third loop. The stream comes by descriptors where it has any and the architecture
    can use them, which frees some."""
    size = 0 if width <= 64 else 1 if width == 128 else 2

    def tiles(target: GPUTarget, tma: bool) -> tuple[int, int, int, int]:
        if target.backend == "hip":  # 64 KB of shared memory
            return (32 if size < 2 else 16, 16, 4, 1) if own_keys else (64 if size < 2 else 32, 16, 4, 1)
        if dtype == torch.float32:
            return ((64, 16, 8, 2), (32, 16, 8, 2), (16 if own_keys else 32, 16, 8, 2))[size]
        large = target.arch in (90, 100, 103)  # 227 KB of shared memory, and products of 64 rows a warp group
        if not own_keys:
            if size == 1 and options and not large:
                return (64, 16, 4, 2)
            return ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32 if large else 16, 8, 2))[size]
        if size == 0 and (options or (window and not large)):
            return (32, 32, 4 if target.arch in (100, 103) else 8, 2)
        if size == 0:
            return (64, 32, 4 if large or not packed else 8, 2)
        if size == 2 or (packed and target.arch in (80, 86, 89, 100, 103)):
            return (32, 32, 8, 2)
        if not large or (tma and not (options or window)):
            return (64, 32, 8, 2)
        return (64, 16, 8, 2) if target.arch == 90 else (32, 32, 4, 2)

    def configs(target: GPUTarget) -> list[triton.Config]:
        tma = described and has_copy_engine(target)
        if own_keys and size == 0 and target.arch == 120:  # they would spill there
            tma = False
        own, stream, warps, stages = tiles(target, tma)
        constants = {"OWN": own, "STREAM": stream, **({"TMA": True} if tma else {})}
        return [triton.Config(constants, num_warps=warps, num_stages=stages)]

    return configs
