"""What attention's forward and backward share: which keys a query sees, and what the options do to a score.

The formulas are in csrc/fastgpt.h, and csrc/cuda/attention.cuh has the same functions. Indices broadcast: a tile of
scores has queries of shape (rows, 1) and keys of shape (1, columns), or the other way round where it is transposed.

An option that a call does not have is None here, so that Triton leaves its arithmetic out: a window's side without
limit (``left``, ``right``), ``softcap``, the slope of ALiBi, the mask, cu_seqlens, and a head dim that fills its tile.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.core import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

MAX_LENGTH = (1 << 30) - 1  # so that no sum of a position, a shift and a window overflows 32 bits
MIN_TILE = 16  # the least extent of a product on tensor cores

# --- where things are ---


@triton.jit
def sequence_of(cu_seqlens_q, cu_seqlens_k, batch, queries, keys):
    """Batch row ``batch``: (its queries, its keys, packed query rows before it, packed key rows before it), of which
    the last two are int64, and zero where nothing is packed."""
    first_query = tl.full((), 0, tl.int64)
    first_key = tl.full((), 0, tl.int64)
    if cu_seqlens_q is not None:
        first_query = tl.load(cu_seqlens_q + batch).to(tl.int64)
        queries = (tl.load(cu_seqlens_q + batch + 1) - first_query).to(tl.int32)
    if cu_seqlens_k is not None:
        first_key = tl.load(cu_seqlens_k + batch).to(tl.int64)
        keys = (tl.load(cu_seqlens_k + batch + 1) - first_key).to(tl.int32)
    return queries, keys, first_query, first_key


@triton.jit
def load_tile(rows, there, columns, dim):
    """The tile of a row for each pointer of ``rows`` (N,), zero where not ``there`` (N,) and from column ``dim`` on.
    None: all rows, or all ``columns``, are there."""
    pointers = rows[:, None] + columns[None, :]
    if there is None and dim is None:
        return tl.load(pointers)
    elif there is None:
        return tl.load(pointers, mask=columns[None, :] < dim, other=0.0)
    elif dim is None:
        return tl.load(pointers, mask=there[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=there[:, None] & (columns[None, :] < dim), other=0.0)


@triton.jit
def described_tile(tiles, batch, head, row):
    """The same tile by its descriptor (``Tiles``): the copy engine of sm_90 and later fetches it, without a
    thread or a register for addresses, and writes zeros for what lies past the tensor's end."""
    tile = tiles.load([tl.cast(batch, tl.int32), tl.cast(head, tl.int32), row, 0])
    return tl.reshape(tile, tile.shape[2:])


@triton.jit
def store_tile(rows, there, columns, dim, tile):
    """The same of a store; ``there`` is given."""
    pointers, inside = rows[:, None] + columns[None, :], there[:, None]
    if dim is not None:
        inside = inside & (columns[None, :] < dim)
    tl.store(pointers, tile.to(rows.dtype.element_ty), mask=inside)


def tile_width(dim: int) -> int:
    """Columns of the tile that holds a head dim."""
    return max(triton.next_power_of_2(dim), MIN_TILE)


def unit_of(tensors: Sequence[Tensor], numbers: Sequence[int]) -> int:
    """Elements that can be accessed at once: those of 16 bytes where every one of ``numbers`` (strides and head dims)
    is a multiple of it, else 1. Kernels get the numbers divided by it, as a constant that they multiply by again, so
    Triton knows how far rows are aligned. What it finds out by itself, multiples of 16 elements, is less.
    """
    unit = 16 // max(t.element_size() for t in tensors)
    return unit if gcd(*numbers) % unit == 0 else 1


def has_copy_engine(target: GPUTarget) -> bool:
    """Whether tiles can be fetched by descriptors (NVIDIA's TMA); elsewhere Triton makes pointers of them."""
    return target.backend == "cuda" and target.arch >= 90


class Tiles(NamedTuple):
    """Where tiles of a tensor come from, an argument of a launch: their descriptor, or None where the configuration
    does not have ``TMA`` and takes pointers."""

    tensor: Tensor
    extents: tuple[int, int, int, int]  # batch, heads, rows, columns
    strides: Sequence[int]  # of the first three; columns are next to each other
    rows: str  # the constant that says how many rows a tile has
    width: int  # and its columns

    def describable(self) -> bool:
        """Whether a descriptor can say it: elements of 16 bits (float32 is read in parts of a row), a beginning and
        strides that are multiples of 16 bytes, nothing that is repeated, nothing empty."""
        size = self.tensor.element_size()
        apart = all(0 < stride * size < 1 << 40 and stride * size % 16 == 0 for stride in self.strides)
        return size == 2 and min(self.extents) > 0 and apart and self.tensor.data_ptr() % 16 == 0

    def __call__(self, constants: dict[str, Any]) -> TensorDescriptor | None:
        if not constants.get("TMA"):
            return None
        tile = [1, 1, constants[self.rows], self.width]
        return TensorDescriptor(self.tensor, list(self.extents), [*self.strides, 1], tile)


def limit(side: int) -> int | None:
    """A side of the window, None where it has no limit."""
    return None if side < 0 else min(side, MAX_LENGTH)


# --- the band: query i sees the keys i + shift - left .. i + shift + right ---


@triton.jit
def first_key_of(query, shift, left):
    """The first key that ``query`` sees. It and the next three grow with their argument: the bounds of a tile are those
    of its first and its last. A query or key may see none: the first is not below the end."""
    if left is None:
        return query * 0
    else:
        return tl.maximum(query + (shift - left), 0)


@triton.jit
def end_key_of(query, shift, right, keys):
    """After the last key that ``query`` sees."""
    if right is None:
        return query * 0 + keys
    else:
        return tl.minimum(query + (shift + right + 1), keys)


@triton.jit
def first_query_of(key, shift, right):
    """The first query that sees ``key``."""
    if right is None:
        return key * 0
    else:
        return tl.maximum(key - (shift + right), 0)


@triton.jit
def end_query_of(key, shift, left, queries):
    """After the last query that sees ``key``."""
    if left is None:
        return key * 0 + queries
    else:
        return tl.minimum(key - (shift - left) + 1, queries)


@triton.jit
def sees(query, key, shift, left, right, keys):
    """Whether ``query`` sees ``key``, which may lie past the end."""
    seen = key < keys
    if left is not None:
        seen = seen & (key >= query + (shift - left))
    if right is not None:
        seen = seen & (key <= query + (shift + right))
    return seen


# --- a score ---


@triton.jit
def capped(score, softcap):
    """softcap tanh(score / softcap); its derivative by the score is 1 - (result / softcap)^2."""
    if softcap is None:
        return score
    else:
        return softcap * tanh(score / softcap)


@triton.jit
def biased(score, seen, query, key, diagonal, slope, mask, mask_stride):
    """The capped score with ALiBi and the mask; -inf where a key is not seen.

    Args:
        seen: ``sees(...)``; no other element of the mask is read.
        diagonal: keys - queries, which ALiBi counts its distances from.
        slope: of the head, or of each row.
        mask: pointers to mask(b, h, i, 0), of the shape of ``query``; boolean or to add.
        mask_stride: from one key to the next.
    """
    if slope is not None:
        score -= slope * tl.abs(query + diagonal - key).to(tl.float32)
    if mask is not None:
        value = tl.load(mask + key.to(tl.int64) * mask_stride, mask=seen, other=0)
        if value.dtype == tl.int1:
            seen = seen & value
        else:
            score += value.to(tl.float32)
    return tl.where(seen, score, float("-inf"))


# --- a row's softmax ---


@triton.jit
def exponential(x, HALF: tl.constexpr):
    """exp of a difference of scores in units of ``score_unit``."""
    return tl.exp2(x) if HALF else tl.exp2(x * LOG2E)


@triton.jit
def finite_or_zero(m):
    """The maximum to subtract: where nothing is seen yet, exp(-inf - 0) is 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def finished(o, m, l, sinks, head, dropout_factor, HALF: tl.constexpr):  # noqa: E741
    """The end of rows: (out, log-sum-exp) from the sums o (rows, columns) and l (rows,) of weights exp(score - m).

    Args:
        sinks: pointer, or None.
        head: (rows,) or one for all.
        dropout_factor: what dropout multiplies the weights by that it keeps; None without.
    """
    if sinks is not None:
        sink = tl.load(sinks + head) * (LOG2E if HALF else 1.0)
        most = tl.maximum(m, sink)
        base = finite_or_zero(most)
        shrink = exponential(m - base, HALF)
        m = most
        l = l * shrink + exponential(sink - base, HALF)  # noqa: E741
        o *= shrink[:, None]
    nothing = m == float("-inf")  # no key is seen, and there is no sink
    divisor = tl.where(nothing, 1.0, l)
    factor = 1.0 if dropout_factor is None else dropout_factor
    if HALF:
        o *= (factor / divisor)[:, None]
    else:  # one rounding less
        o = tl.div_rn(o * factor, tl.broadcast_to(divisor[:, None], o.shape))
    return o, tl.where(nothing, float("inf"), (m * LN2 if HALF else m) + tl.log(divisor))


# --- dropout ---


def dropout_scale(threshold: int) -> float:
    """The weights that dropout keeps are multiplied by this: 1 without dropout, 0 where all are dropped."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0
