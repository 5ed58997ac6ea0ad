"""The stable sort of embedding's tokens by row: least significant digit first, 8 bits a pass.

A pass has three launches: how often each digit occurs in each tile of 256 keys; where the keys of each tile and digit
go, by one program that runs over the tiles; and the keys' own moves. A key's rank among those of its tile with the same
digit comes from comparing it with all of them: 256 comparisons, less than a sort of the tile would take.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch, one_config

BITS = 8
DIGITS = tl.constexpr(1 << BITS)
TILE = 256  # keys of a program
ROWS = 1024  # rows whose first key a program searches


@triton.jit(do_not_specialize=["count", "shift"])
def embedding_histogram_kernel(histogram, keys, count, shift, TILE: tl.constexpr):
    """histogram[tile][digit]: the number of the tile's keys with that digit."""
    tile = tl.program_id(0)
    i = tile * TILE + tl.arange(0, TILE)
    digit = tl.where(i < count, (tl.load(keys + i, mask=i < count, other=0) >> shift) % DIGITS, -1)
    every = tl.arange(0, DIGITS)
    here = tl.sum((digit[:, None] == every[None, :]).to(tl.int32), 0)
    tl.store(histogram + tile * DIGITS + every, here)


@triton.jit(do_not_specialize=["tiles"])
def embedding_places_kernel(places, histogram, tiles, TILES: tl.constexpr):
    """places[tile][digit]: the number of keys that go before the first of the tile with that digit, which are those
    with a smaller digit, and those of the tiles before with the same."""
    digit = tl.arange(0, DIGITS)
    total = tl.zeros([DIGITS], tl.int32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)[:, None]
        total += tl.sum(tl.load(histogram + tile * DIGITS + digit[None, :], mask=tile < tiles, other=0), 0)
    place = tl.cumsum(total, 0) - total
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)[:, None]
        here = tl.load(histogram + tile * DIGITS + digit[None, :], mask=tile < tiles, other=0)
        before = tl.cumsum(here, 0) - here
        tl.store(places + tile * DIGITS + digit[None, :], place[None, :] + before, mask=tile < tiles)
        place += tl.sum(here, 0)


@triton.jit(do_not_specialize=["count", "shift"])
def embedding_scatter_kernel(sorted_keys, sorted_order, keys, order, places, count, shift, TILE: tl.constexpr):
    tile = tl.program_id(0)
    place = tl.arange(0, TILE)
    i = tile * TILE + place
    key = tl.load(keys + i, mask=i < count, other=0)
    digit = tl.where(i < count, (key >> shift) % DIGITS, -1)
    before = (digit[:, None] == digit[None, :]) & (place[:, None] < place[None, :])
    to = tl.load(places + tile * DIGITS + digit, mask=i < count, other=0) + tl.sum(before.to(tl.int32), 0)
    tl.store(sorted_keys + to, key, mask=i < count)
    tl.store(sorted_order + to, tl.load(order + i, mask=i < count, other=0), mask=i < count)


@triton.jit(do_not_specialize=["count", "rows", "steps"])
def embedding_first_kernel(first, keys, count, rows, steps, ROWS: tl.constexpr):
    """first[k] = the number of keys below k, for k up to and including `rows`: a binary search for each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = tl.zeros([ROWS], tl.int32) + count
    for _ in range(0, steps):
        open = low < high
        middle = low + (high - low) // 2
        below = tl.load(keys + middle, mask=open, other=0) < row
        low = tl.where(open & below, middle + 1, low)
        high = tl.where(open & (below == 0), middle, high)
    tl.store(first + row, low, mask=row <= rows)


def sort_by_key(keys: Tensor, order: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(keys, order) sorted by keys, which are int32 from 0 to ``most``; the given tensors are used as workspace."""
    count = keys.numel()
    tiles = triton.cdiv(count, TILE)
    other_keys, other_order = torch.empty_like(keys), torch.empty_like(order)
    histogram, places = (keys.new_empty(tiles, DIGITS.value) for _ in range(2))
    configs = one_config(TILE=TILE, num_warps=8)
    for shift in range(0, most.bit_length(), BITS):
        launch(embedding_histogram_kernel, (tiles,), histogram, keys, count, shift, configs=configs)
        launch(embedding_places_kernel, (1,), places, histogram, tiles, configs=one_config(TILES=16, num_warps=8))
        launch(
            embedding_scatter_kernel, (tiles,), other_keys, other_order, keys, order, places, count, shift,
            configs=configs,
        )  # fmt: skip
        keys, order, other_keys, other_order = other_keys, other_order, keys, order
    return keys, order


def first_of_rows(keys: Tensor, rows: int) -> Tensor:
    """(rows + 1,) int32: the place of the first of the sorted keys that is not below each row."""
    first = keys.new_empty(rows + 1)
    count = keys.numel()
    launch(
        embedding_first_kernel, (triton.cdiv(rows + 1, ROWS),), first, keys, count, rows, count.bit_length(),
        configs=one_config(ROWS=ROWS),
    )  # fmt: skip
    return first
