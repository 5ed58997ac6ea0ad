"""What several kernels of this folder share."""

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch, one_config

# Counter word 3 of Philox, as in csrc/core/philox.h: a constant for each consumer of random numbers.
SAMPLE_STREAM = tl.constexpr(1)
ATTENTION_STREAM = tl.constexpr(2)


@triton.jit
def uniform_bits(seed, row, position):
    """A uniform 64-bit integer, uint64, for (seed, row, position), each int64: what a draw of ``sample`` uses.

    Triton's own Philox4x32-10 is the published one, with the key (seed mod 2^32, seed div 2^32): csrc/core/philox.h's.
    """
    high, low, _, _ = tl.philox(
        seed, position.to(tl.uint32), (position >> 32).to(tl.uint32), row.to(tl.uint32), SAMPLE_STREAM
    )
    return high.to(tl.uint64) << 32 | low.to(tl.uint64)


@triton.jit
def dropout_values(seed, head, query, first_key, KEYS: tl.constexpr):
    """The 16-bit number of every attention weight of a tile, int32 (queries, KEYS): a weight is kept where it is at
    least dropout_p * 65536. One call of Philox gives the numbers of eight keys.

    Args:
        seed: int64.
        head: batch * heads + head.
        query: (queries,) positions.
        first_key: a multiple of 8.
        KEYS: keys first_key .. first_key + KEYS - 1; a power of two, at least 8.
    """
    tl.static_assert(KEYS >= 8)
    block = first_key // 8 + tl.arange(0, KEYS // 8)
    counter = tl.zeros((query.shape[0], KEYS // 8), tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        counter + block.to(tl.uint32)[None, :],
        counter + query.to(tl.uint32)[:, None],
        counter + tl.to_tensor(head).to(tl.uint32),
        counter + ATTENTION_STREAM,
    )
    # Key 8 block + n has the half n % 2 of word n / 2: a dimension for each bit of n.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words & 0xFFFF, words >> 16).reshape(query.shape[0], KEYS).to(tl.int32)


@triton.jit
def tanh(x):
    """tanh of float32, to about 2 units in the last place; Triton's own is not in its interpreter.

    Up to 0.625 an odd polynomial (least maximum of the relative error, 4e-9), then by exp.
    """
    square = x * x
    part = -5.70498677e-3 * square + 2.06390870e-2
    part = part * square - 5.37397150e-2
    part = part * square + 1.33314422e-1
    part = part * square - 3.33332819e-1
    small = x + x * square * part
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


# --- sums down the columns of a matrix (gradients of weights and biases) in two stages, deterministic ---
#
# A program sums a chunk of rows, each thread its own columns, and writes partial[chunk][kind][column], float32;
# ``write_column_sums`` adds the chunks. Enough chunks that every multiprocessor of a large device has a few, and rows
# enough in each that the partial sums (written once and read once, mostly in L2) are few beside the rows.
MOST_CHUNKS, LEAST_CHUNK_ROWS = 512, 16


def chunk_rows(rows: int, rows_at_once: int) -> int:
    """Rows in a chunk, a multiple of ``rows_at_once``: by their number alone, never by the device."""
    return triton.cdiv(max(triton.cdiv(rows, MOST_CHUNKS), LEAST_CHUNK_ROWS), rows_at_once) * rows_at_once


@triton.jit(do_not_specialize=["chunks"])
def column_sums_kernel(first, second, partial, chunks, cols, kinds, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    lane, kind = tl.arange(0, CHUNKS), tl.program_id(1)
    sums = tl.zeros((COLS, CHUNKS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = (start + lane).to(tl.int64)
        at = col[:, None] + ((chunk * kinds + kind) * cols)[None, :]
        sums += tl.load(partial + at, mask=(col < cols)[:, None] & (chunk < chunks)[None, :], other=0.0)
    total = tl.sum(sums, 1)
    if kind == 0:
        tl.store(first + col, total.to(first.dtype.element_ty), mask=col < cols)
    else:
        tl.store(second + col, total.to(second.dtype.element_ty), mask=col < cols)


def write_column_sums(partial: Tensor, *sums: Tensor) -> None:
    """Writes the sums over all chunks of ``partial`` (chunks, kinds, cols): kind 0 to the first of ``sums``, kind 1 to
    the second, if there is one."""
    chunks, kinds, cols = partial.shape
    # 2048 elements, 16 for each of 128 threads: many columns at once where there are few chunks.
    tile = {"CHUNKS": 4, "COLS": 512} if chunks <= 4 else {"CHUNKS": 64, "COLS": 32}
    launch(
        column_sums_kernel, (triton.cdiv(cols, tile["COLS"]), kinds), sums[0], sums[-1], partial, chunks, cols, kinds,
        configs=one_config(**tile),
    )  # fmt: skip
