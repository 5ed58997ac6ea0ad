"""Device functions that several kernels of this folder share."""

import triton
import triton.language as tl

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
