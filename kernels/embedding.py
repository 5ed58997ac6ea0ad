"""embedding: y[n, t] = weight[token[n, t]] + position_weight[start + t], and its gradients.

    dweight[v] = sum of dy over the tokens equal to v;  dposition[p] = sum of dy over the tokens at p

Bytes: forward reads one or two rows and writes a row for each token. Backward reads dy once for each gradient and
writes every row of it once; for GPT-2's vocabulary the rows that no token touched, all zero, are most of it.

Backward without atomics: the tokens are sorted by row, stably (kernels/embedding_sort.py), so each row has its tokens
in order, and they are added in that order. A row of more than 64 tokens (a space, a padding token) would keep its
program busy after all others are done: its tokens are cut into pieces of 64, summed by programs of their own, 16 tokens
side by side, and the pieces' sums are added in order. So the order of additions depends on the tokens and on how dy
lies in memory, on nothing else. The positions of one start for all are sorted by formula. Workspace: 24 bytes a token,
4 a row, and a float row for each 32 tokens.

A token or position out of range cannot be an exception without waiting for the device: its row of y is NaN, and the
gradients leave it out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.embedding_sort import first_of_rows, sort_by_key
from fastgpt.kernels.launch import launch, one_config

TILE = 2048  # elements of a program: 16 for each of 128 threads
WIDEST = 256  # columns of a program: 16 bytes for each lane of a warp, in 16-bit types
KEYS = 1024  # tokens whose keys a program finds
PIECE = tl.constexpr(64)  # tokens of a row that one program sums
MOST = 2**31 - 1 - 4096  # tokens and rows, counted in int32


@triton.jit
def _token_row(tokens, i, inside, vocabulary):
    """The row that token i names, or -1."""
    token = tl.load(tokens + i, mask=inside, other=-1).to(tl.int64)
    return tl.where((token >= 0) & (token < vocabulary), token, -1)


@triton.jit
def _position_row(starts, start, i, inside, sequences_per_start, length, positions):
    """The row of token i's position, or -1."""
    sequence = i // length
    first = tl.zeros_like(i) + start
    if starts is not None:
        first = tl.load(starts + sequence // sequences_per_start, mask=inside, other=-1)
    known = (first >= 0) & (first < positions)
    position = tl.where(known, first, 0) + (i - sequence * length)
    return tl.where(known & (position < positions), position, -1)


@triton.jit(do_not_specialize=["start", "count", "sequences_per_start", "length", "vocabulary", "positions"])
def embedding_forward_kernel(
    y, tokens, weight, position_weight, starts, start, count, sequences_per_start, length, width, vocabulary, positions,
    weight_stride, position_stride, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = i < count
    row = _token_row(tokens, i, inside, vocabulary)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    within = inside[:, None] & (col < width)
    good = row >= 0
    if position_weight is not None:
        position = _position_row(starts, start, i, inside, sequences_per_start, length, positions)
        good = good & (position >= 0)
        at = (position * position_stride)[:, None] + col
        added = tl.load(position_weight + at, mask=within & good[:, None], other=0.0).to(tl.float32)
    at = (row * weight_stride)[:, None] + col
    v = tl.load(weight + at, mask=within & good[:, None], other=float("nan"))
    if position_weight is not None:
        v = (v.to(tl.float32) + added).to(y.dtype.element_ty)
    tl.store(y + (i * width)[:, None] + col, v, mask=within)


# --- gradients ---


@triton.jit(do_not_specialize=["start", "count", "sequences", "sequences_per_start", "length", "rows", "padding"])
def embedding_keys_kernel(
    keys, order, tokens, starts, start, count, sequences, sequences_per_start, length, rows, padding,
    POSITIONS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """keys[i] is the row of token order[i]; `rows` for one that counts for none, so that it comes last.

    With positions of one start for all, the order is already that of the keys.
    """
    i = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    inside = i < count
    if POSITIONS:
        at = i
        if starts is None:
            at = i % sequences * length + i // sequences
        row = _position_row(starts, start, at, inside, sequences_per_start, length, rows)
    else:
        at = i
        row = _token_row(tokens, i, inside, rows)
        row = tl.where(row == padding, -1, row)
    tl.store(keys + i, tl.where(row >= 0, row, rows).to(tl.int32), mask=inside)
    tl.store(order + i, at.to(tl.int32), mask=inside)


@triton.jit
def _piece_row(place, first_of_row):
    """Where the sum of the piece that starts at `place` of the order is kept. Two pieces may start within the same
    PIECE places, but only one of them is the first of its row: rows cut into pieces are longer than that."""
    return (place // PIECE * 2 + first_of_row).to(tl.int64)


@triton.jit(do_not_specialize=["count", "rows"])
def embedding_pieces_kernel(
    pieces, dy, keys, order, first, count, rows, width, dy_stride, TOKENS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The sums of the pieces of rows with more than PIECE tokens. A program has the pieces that start in PIECE places:
    none, one that continues a row, one that is a row's first, or both."""
    place = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    key = tl.load(keys + place, mask=place < count, other=rows)
    begin = tl.load(first + key, mask=key < rows, other=0)
    end = tl.load(first + key + 1, mask=key < rows, other=0)
    starting = (end - begin > PIECE) & ((place - begin) % PIECE == 0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    for first_of_row in tl.static_range(2):
        mine = starting & ((place == begin) == (first_of_row == 1))
        start = tl.max(tl.where(mine, place, -1), 0)
        if start >= 0:
            terms = tl.minimum(tl.max(tl.where(mine, end, 0), 0) - start, PIECE)
            total = tl.zeros([COLS], tl.float32)
            for i in range(0, terms, TOKENS):
                token = i + tl.arange(0, TOKENS)
                at = tl.load(order + start + token, mask=token < terms, other=0).to(tl.int64)[:, None] * dy_stride
                v = tl.load(dy + at + col[None, :], mask=(token < terms)[:, None] & (col < width)[None, :], other=0.0)
                total += tl.sum(v.to(tl.float32), 0)
            tl.store(pieces + _piece_row(start, first_of_row) * width + col, total, mask=col < width)


@triton.jit(do_not_specialize=["rows"])
def embedding_rows_kernel(
    out, pieces, dy, order, first, rows, width, dy_stride, MEAN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    begin = tl.load(first + row, mask=row < rows, other=0)
    count = tl.load(first + row + 1, mask=row < rows, other=0) - begin
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < width)
    short = tl.where(count <= PIECE, count, 0)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(0, tl.max(short), 4):  # four rows of dy on their way from memory at a time
        at0 = tl.load(order + begin + i, mask=i < short, other=0).to(tl.int64) * dy_stride
        at1 = tl.load(order + begin + i + 1, mask=i + 1 < short, other=0).to(tl.int64) * dy_stride
        at2 = tl.load(order + begin + i + 2, mask=i + 2 < short, other=0).to(tl.int64) * dy_stride
        at3 = tl.load(order + begin + i + 3, mask=i + 3 < short, other=0).to(tl.int64) * dy_stride
        v0 = tl.load(dy + at0 + col, mask=inside & (i < short), other=0.0).to(tl.float32)
        v1 = tl.load(dy + at1 + col, mask=inside & (i + 1 < short), other=0.0).to(tl.float32)
        v2 = tl.load(dy + at2 + col, mask=inside & (i + 2 < short), other=0.0).to(tl.float32)
        v3 = tl.load(dy + at3 + col, mask=inside & (i + 3 < short), other=0.0).to(tl.float32)
        total = total + v0 + v1 + v2 + v3
    cut = (count - short + PIECE - 1) // PIECE
    for i in range(0, tl.max(cut)):
        at = _piece_row(begin + i * PIECE, i == 0) * width
        total += tl.load(pieces + at + col, mask=inside & (i < cut), other=0.0)
    if MEAN:
        total = total * (1.0 / tl.maximum(count, 1).to(tl.float32))
    tl.store(out + row.to(tl.int64) * width + col, total.to(out.dtype.element_ty), mask=inside)


# --- entries ---


def embedding_forward(
    *, y: Tensor, tokens: Tensor, weight: Tensor, position_weight: Tensor | None, starts: Tensor | None, start: int,
    sequences: int, sequences_per_start: int, length: int, width: int, vocabulary: int, positions: int,
    weight_stride: int, position_stride: int, wide_tokens: bool, dtype: int,
) -> None:  # fmt: skip
    count = sequences * length
    _check("tokens", count)
    grid, configs = _tiles(count, width, "TOKENS")
    launch(
        embedding_forward_kernel, grid, y, tokens, weight, position_weight, starts, start, count, sequences_per_start,
        length, width, vocabulary, positions, weight_stride, position_stride, configs=configs,
    )  # fmt: skip


def embedding_backward(
    *, dweight: Tensor | None, dposition_weight: Tensor | None, dy: Tensor, tokens: Tensor, starts: Tensor | None,
    start: int, sequences: int, sequences_per_start: int, length: int, width: int, vocabulary: int, positions: int,
    dy_stride: int, padding: int, scale_grad_by_freq: bool, wide_tokens: bool, dtype: int,
) -> None:  # fmt: skip
    count = sequences * length
    _check("tokens", count)

    def sum_by_key(out: Tensor, rows: int, by_position: bool, mean: bool) -> None:
        """out[k] = the sum of the rows of dy whose key is k, for every k < rows."""
        _check("rows", rows)
        keys, order = (torch.empty(count, dtype=torch.int32, device=dy.device) for _ in range(2))
        launch(
            embedding_keys_kernel, (triton.cdiv(count, KEYS),), keys, order, tokens, starts, start, count, sequences,
            sequences_per_start, length, rows, padding, configs=one_config(KEYS=KEYS), POSITIONS=by_position,
        )  # fmt: skip
        if not by_position or starts is not None:
            keys, order = sort_by_key(keys, order, rows)
        first = first_of_rows(keys, rows)
        pieces = None
        if count > PIECE.value:
            pieces = dy.new_empty(triton.cdiv(count, PIECE.value) * 2, width, dtype=torch.float32)
            grid = (triton.cdiv(count, PIECE.value), triton.cdiv(width, WIDEST))
            launch(
                embedding_pieces_kernel, grid, pieces, dy, keys, order, first, count, rows, width, dy_stride,
                configs=one_config(TOKENS=16, COLS=min(triton.next_power_of_2(width), WIDEST)),
            )  # fmt: skip
        # float32 has four rows of dy in twice the registers.
        grid, configs = _tiles(rows, width, "ROWS", num_warps=8 if dy.dtype == torch.float32 else 4)
        launch(
            embedding_rows_kernel, grid, out, dy if pieces is None else pieces, dy, order, first, rows, width,
            dy_stride, configs=configs, MEAN=mean,
        )  # fmt: skip

    if dweight is not None:
        sum_by_key(dweight, vocabulary, False, scale_grad_by_freq)
    if dposition_weight is not None:
        sum_by_key(dposition_weight, positions, True, False)


def _tiles(rows: int, width: int, name: str, num_warps: int = 4) -> tuple[Any, Any]:
    """(grid, configs) for tiles of rows x columns, of which the configuration calls the rows ``name``."""
    cols = min(triton.next_power_of_2(width), WIDEST)
    tile = {name: TILE // cols, "COLS": cols}
    return (triton.cdiv(rows, tile[name]), triton.cdiv(width, cols)), one_config(**tile, num_warps=num_warps)


def _check(what: str, count: int) -> None:
    if count > MOST:
        raise ValueError(f"embedding: {count} {what}; the Triton kernels take up to {MOST}")
