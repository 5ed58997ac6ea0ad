"""sample: one token a row, after penalties, bias, temperature, top-k, top-p and min-p (fastgpt/ops/sample.py).

One launch, nothing sorted, and from the same bits the token that the CPU and the CUDA kernel draw: a weight is 2^e by a
fixed sequence of IEEE operations (launched with fp_fusion=False), rounded to an integer in units of 2^-42, so a sum has
no order; every choice is a comparison of integers or of logits.

A program has ROWS rows: one, or several where the vocabulary fits into a tile of COLS. It streams its row a few times,
the first time from memory, then from L2:

    always      the largest logit, NaN and +inf; the row goes to a workspace, as float32, after penalties and bias
    top-k       every lane's own maximum is a group's: the k-th largest of these bounds the k-th largest logit from
                below, tightly; what reaches it, little more than k elements, goes to a list; the rest happens there
    min-p       where it comes alone, what can reach it goes to the list
    top-p       the weights above four thresholds, which are dense where the probability is; the part of the row between
                two of them goes to a scratch list, and ``_select`` goes on there
    the draw    the sum of the weights kept, by tile, and the tile in which the random number lies once more

``_select`` is everything: the largest key t such that the elements with keys >= t weigh at least so much, by four
thresholds at a time. There is no histogram: Triton's counts only, adds in ballots, and
atomics of 64 bits per element would queue on flat distributions. Lists that would be longer than CAPACITY are not made:
``_select`` reads the row again, which is slower, never wrong.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import core
from fastgpt.kernels.launch import launch, one_config

_LN2 = tl.constexpr(0.6931471805599453)
_LOG_UNIT = tl.constexpr(42 * 0.6931471805599453)  # weights are in units of 2^-42
# Temperatures beyond count as these, as on the CPU.
_LOWEST_TEMPERATURE = tl.constexpr(1e-30)
_HIGHEST_TEMPERATURE = tl.constexpr(1e30)
_LEAST_KEY = tl.constexpr(0x007FFFFF)  # of -inf
_SPLIT = tl.constexpr(4)  # thresholds of one step of a selection; 8 take too many registers
_LIST_COLS = tl.constexpr(2048)  # the tile in which lists are read, where a row has several


# --- keys and weights ---


@triton.jit
def _ordered_bits(x):
    """A uint32 that orders as the float32 does; -0 counts as +0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return bits ^ ((bits.to(tl.int32, bitcast=True) >> 31).to(tl.uint32, bitcast=True) | 0x80000000)


@triton.jit
def _from_ordered_bits(key):
    flipped = ~(key.to(tl.int32, bitcast=True) >> 31)
    return (key ^ (flipped.to(tl.uint32, bitcast=True) | 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _power(x, best, scale):
    """exp((x - best) / temperature), as the CPU computes it: every operation here, in this order, and none fused."""
    e = tl.maximum((x - best) * scale, -64.0)
    shifted = e + 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    fraction = e - (shifted - 12582912.0)
    p = fraction * 0.00015353361959569156 + 0.0013398875016719103
    p = p * fraction + 0.00961843691766262
    p = p * fraction + 0.055503323674201965
    p = p * fraction + 0.24022647738456726
    p = p * fraction + 0.6931471824645996
    p = p * fraction + 1.0
    bits = p.to(tl.uint32, bitcast=True) + (shifted.to(tl.uint32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(weight):
    """weight * 2^42 to the nearest integer, ties to even, int64, for weights from 2^-64 to 1. Not by a sum of doubles,
    which some GPUs compute at a sixty-fourth of the speed."""
    bits = weight.to(tl.int32, bitcast=True)
    shift = (bits >> 23) - (127 + 23 - 42)
    exact = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) << tl.maximum(shift, 0)
    # Below 2^23 units: adding 2^23 leaves the nearest integer in the low bits.
    small = (weight * 4398046511104.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(shift < 0, small.to(tl.int64), exact)


@triton.jit
def _load(base, start, count, COLS: tl.constexpr):
    """(ROWS, COLS) elements from ``start`` on, as float32; -inf from ``count`` on. Also which of them there are."""
    at = start + tl.arange(0, COLS)[None, :]
    inside = at < count
    return tl.load(base + at, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def _at(base, offset):
    """The row or a list of its, by its offset: what a loop carries is a number; AMD's compiler takes no pointer."""
    return base + tl.multiple_of(offset, 16)


# --- selection ---


@triton.jit
def _sums(base, count, thresholds, high, best, scale, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """For each of a row's thresholds (ROWS, 4) the weight of the elements with keys from it to ``high``; or their
    number."""
    EACH: tl.constexpr = 4 if ROWS * COLS >= 2048 else 1  # neighbours that a thread adds up by itself
    parts = tl.zeros((ROWS, COLS // EACH, _SPLIT), tl.int64 if WEIGHTED else tl.int32)
    for start in range(0, count, COLS):
        x, inside = _load(base, start, count, COLS)
        key = _ordered_bits(x)
        if WEIGHTED:
            weight = _rounded(_power(x, best[:, None], scale[:, None]))
        else:
            weight = tl.full((ROWS, COLS), 1, tl.int32)
        weight = tl.where(inside & (key <= high[:, None]), weight, 0)
        key = key.reshape(ROWS, COLS // EACH, EACH)[:, :, :, None]
        weight = weight.reshape(ROWS, COLS // EACH, EACH)[:, :, :, None]
        parts += tl.sum(tl.where(key >= thresholds[:, None, None, :], weight, 0), axis=2)
    return tl.sum(parts, axis=1)


@triton.jit
def _item(table, at):
    """table[i, at[i]] for a table (ROWS, 4); 0 where ``at`` is 4."""
    return tl.sum(tl.where(tl.arange(0, _SPLIT)[None, :] == at[:, None], table, 0), axis=1)


@triton.jit
def _choose(thresholds, sums, high, needed):
    """The range (low, high) between two thresholds in which the sum reaches ``needed``, and what is needed there."""
    reached = tl.max(tl.where(sums >= needed[:, None], tl.arange(0, _SPLIT)[None, :], 0), axis=1)
    is_last = reached == _SPLIT - 1
    high = tl.where(is_last, high, tl.minimum(_item(thresholds, reached + 1) - 1, high))
    return _item(thresholds, reached), high, needed - _item(sums, reached + 1)


@triton.jit
def _between(low, high):
    """Four thresholds from ``low`` on (ROWS, 4) that divide the range: its keys, or, from finite negative logits to
    positive ones, the logits, since half of the keys between would be those of numbers next to zero."""
    number = tl.arange(0, _SPLIT)[None, :]
    step = ((high - low) >> 2) + 1
    keys = low[:, None] + step[:, None] * number.to(tl.uint32)
    part = number.to(tl.float32) / _SPLIT
    logits = _from_ordered_bits(low)[:, None] * (1 - part) + _from_ordered_bits(high)[:, None] * part
    mixed = (low > _LEAST_KEY) & (low < 0x80000000) & (high >= 0x80000000)
    return tl.where(mixed[:, None] & (number > 0), tl.maximum(_ordered_bits(logits), low[:, None]), keys)


@triton.jit
def _range(base, count, low, high, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The smallest and the largest key that there is in low .. high."""
    least = tl.full((ROWS, COLS), 0xFFFFFFFF, tl.uint32)
    most = tl.zeros((ROWS, COLS), tl.uint32)
    for start in range(0, count, COLS):
        x, inside = _load(base, start, count, COLS)
        key = _ordered_bits(x)
        wanted = inside & (key >= low[:, None]) & (key <= high[:, None])
        least = tl.minimum(least, tl.where(wanted, key, 0xFFFFFFFF))
        most = tl.maximum(most, tl.where(wanted, key, 0))
    return tl.min(least, axis=1), tl.max(most, axis=1)


@triton.jit
def _collect(base, count, low, high, values, tokens, capacity, COLS: tl.constexpr):
    """Writes the elements with keys in low .. high, in order, and their places if ``tokens``; nothing after
    ``capacity``. Returns how many they are. ``values`` may be ``base``. One row."""
    tl.debug_barrier()  # whoever read the list is done
    kept = 0
    for start in range(0, count, COLS):
        x, inside = _load(base, start, count, COLS)
        key = _ordered_bits(x)
        wanted = inside & (key >= low[:, None]) & (key <= high[:, None])
        one = wanted.to(tl.int32)
        place = tl.where(wanted, kept + tl.cumsum(one, axis=1) - one, capacity)
        tl.store(values + place, x, mask=place < capacity)
        if tokens is not None:
            at = start + tl.arange(0, COLS)[None, :]
            tl.store(tokens + place, at, mask=place < capacity)
        kept += tl.sum(tl.sum(one, axis=1), axis=0)
    tl.debug_barrier()
    return kept


@triton.jit
def _select(
    base, offset, count, low, high, thresholds, needed, top_p, best, scale, spare, capacity,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The largest key in low .. high such that there are at least ``needed`` elements from it to ``high``; or, if
    WEIGHTED, such that they weigh at least the share ``top_p`` of those from ``low`` on. ``thresholds`` (ROWS, 4),
    from ``low`` on, are the first to try. Where a row has several tiles, what lies in low .. high moves from
    ``offset`` to ``spare`` as soon as it fits."""
    first = WEIGHTED
    while tl.max((low < high).to(tl.int32), axis=0) > 0:
        sums = _sums(_at(base, offset), count, thresholds, high, best, scale, WEIGHTED, ROWS, COLS)
        if WEIGHTED and first:
            total = _item(sums, tl.zeros_like(low).to(tl.int32))
            share = tl.ceil(top_p * total.to(tl.float64))
            needed = tl.minimum(tl.maximum(share, 1.0).to(tl.int64), total)
            first = False
        low, high, needed = _choose(thresholds, sums, high, needed)
        if TILES > 1 and count > COLS:
            kept = _collect(_at(base, offset), count, low, high, _at(base, spare), None, capacity, COLS)
            if kept <= capacity:
                offset = spare
                count = kept
        low, high = _range(_at(base, offset), count, low, high, ROWS, COLS)
        thresholds = _between(low, high)
    return low


# --- the logits ---


@triton.jit
def _scan(base, bias, out, count, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Adds the bias and writes the row to ``out`` (either may be None). Returns the maximum of every lane's elements
    (ROWS, COLS), and whether one of the row's is NaN or +inf."""
    maxima = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    bad = tl.zeros((ROWS, COLS), tl.int32)
    for start in range(0, count, COLS):
        x, inside = _load(base, start, count, COLS)
        at = start + tl.arange(0, COLS)[None, :]
        if bias is not None:
            x += tl.load(bias + at, mask=inside, other=0.0)
        if out is not None:
            tl.store(out + at, x, mask=inside)
        bad |= (x < float("inf")).to(tl.int32) ^ 1
        maxima = tl.maximum(maxima, x)
    return maxima, tl.max(bad, axis=1) > 0


@triton.jit
def _penalise(
    logits, bias, x, previous, first, previous_count, vocab, live, repetition, presence, frequency,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Penalties on the tokens of ``previous``, in float64, rounded once, then the bias. A token's place in ``x`` counts
    its occurrences first; whoever counted the first of them writes the logit. ``first`` (L) is scratch. Whether a
    previous token is none of the vocabulary's."""
    counts = x.to(tl.pointer_type(tl.int32), bitcast=True)
    unknown = tl.zeros((ROWS, COLS), tl.int32)
    tl.debug_barrier()
    for start in range(0, previous_count, COLS):
        at = start + tl.arange(0, COLS)[None, :]
        token = tl.load(previous + at, mask=at < previous_count, other=-1)
        unknown |= ((token < -1) | (token >= vocab)).to(tl.int32)
        tl.store(counts + token, 0, mask=live & (token >= 0) & (token < vocab))
    tl.debug_barrier()
    for start in range(0, previous_count, COLS):
        at = start + tl.arange(0, COLS)[None, :]
        token = tl.load(previous + at, mask=at < previous_count, other=-1)
        known = live & (token >= 0) & (token < vocab)
        before = tl.atomic_add(counts + token, 1, mask=known, sem="relaxed", scope="cta")
        tl.store(first + at, (known & (before == 0)).to(tl.int32), mask=live & (at < previous_count))
    tl.debug_barrier()
    for start in range(0, previous_count, COLS):
        at = start + tl.arange(0, COLS)[None, :]
        token = tl.load(previous + at, mask=at < previous_count, other=-1)
        mine = tl.load(first + at, mask=live & (at < previous_count), other=0) > 0
        count = tl.load(counts + token, mask=mine, other=0)
        v = tl.load(logits + token, mask=mine, other=0.0).to(tl.float32).to(tl.float64)
        v = tl.where(v > 0, v / repetition, v * repetition)
        penalised = (v - presence - frequency * count.to(tl.float64)).to(tl.float32)
        if bias is not None:
            penalised += tl.load(bias + token, mask=mine, other=0.0)
        tl.store(x + token, penalised, mask=mine)
    tl.debug_barrier()
    return tl.max(unknown, axis=1) > 0


# --- options ---


@triton.jit
def _real(table, index, column: tl.constexpr, bits):
    """An option by row, float64: from the table, or the same for all rows."""
    if table is not None:
        return tl.load(table + index * 6 + column)
    return (tl.zeros_like(index) + bits).to(tl.float64, bitcast=True)


@triton.jit
def _integer(table, index, columns: tl.constexpr, column: tl.constexpr, value):
    if table is not None:
        return tl.load(table + index * columns + column)
    return tl.zeros_like(index) + value


@triton.jit
def _not_below(x):
    """The smallest float32 that is at least x, for 0 <= x <= 1."""
    nearest = x.to(tl.float32)
    up = (nearest.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(nearest.to(tl.float64) < x, up, nearest)


# --- the kernel ---


@triton.jit
def _first_equal(base, count, best, ROWS: tl.constexpr, COLS: tl.constexpr):
    first = tl.full((ROWS, COLS), 0x7FFFFFFF, tl.int32)
    for start in range(0, count, COLS):
        x, _ = _load(base, start, count, COLS)
        at = start + tl.arange(0, COLS)[None, :]
        first = tl.minimum(first, tl.where(x == best[:, None], at, 0x7FFFFFFF))
    return tl.min(first, axis=1)


@triton.jit
def _kept_weight(x, best, scale, lowest, lowest_weight):
    weight = _power(x, best[:, None], scale[:, None])
    return tl.where((x >= lowest[:, None]) & (weight >= lowest_weight[:, None]), _rounded(weight), 0)


@triton.jit
def _draw(
    base, count, random, best, scale, lowest, lowest_weight, ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr
):
    """The place of the element drawn in proportion to the weights kept, and their sum."""
    tile = tl.arange(0, TILES)[None, :]
    sums = tl.zeros((ROWS, TILES), tl.int64)
    for start in range(0, count, COLS):
        x, _ = _load(base, start, count, COLS)  # beyond the end weights are 0
        weight = tl.sum(_kept_weight(x, best, scale, lowest, lowest_weight), axis=1)
        sums = tl.where(tile == start // COLS, weight[:, None], sums)
    total = tl.sum(sums, axis=1)
    target = tl.umulhi(random, total.to(tl.uint64)).to(tl.int64)
    so_far = tl.cumsum(sums, axis=1)
    passed = so_far <= target[:, None]
    start = tl.sum(passed.to(tl.int32), axis=1) * COLS
    target -= tl.max(tl.where(passed, so_far, 0), axis=1)
    x, _ = _load(base, tl.minimum(start, count - 1)[:, None], count, COLS)
    so_far = tl.cumsum(_kept_weight(x, best, scale, lowest, lowest_weight), axis=1)
    return start + tl.sum((so_far <= target[:, None]).to(tl.int32), axis=1), total


# Lengths, strides and options that change from call to call must not compile the kernel again.
@triton.jit(
    do_not_specialize=[
        "rows", "previous_count", "temperature_bits", "top_p_bits", "min_p_bits", "repetition_bits", "presence_bits",
        "frequency_bits", "all_top_k", "all_seed", "all_position", "all_row",
    ]
)  # fmt: skip
def sample_kernel(
    token, log_prob, logits, reals, integers, row_keys, previous, bias, workspace, first, list_tokens, rows,
    vocab, previous_count: tl.int64, logits_stride: tl.int64, bias_stride: tl.int64, workspace_stride: tl.int64,
    temperature_bits: tl.int64, top_p_bits: tl.int64, min_p_bits: tl.int64,
    repetition_bits: tl.int64, presence_bits: tl.int64, frequency_bits: tl.int64, all_top_k: tl.int64,
    all_seed: tl.int64, all_position: tl.int64, all_row: tl.int64,
    ROWS: tl.constexpr, COLS: tl.constexpr, TILES: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = (row < rows)[:, None]
    index = tl.minimum(row, rows - 1).to(tl.int64)  # rows beyond the end do the last one's work, and write nothing

    # Options.
    temperature = _real(reals, index, 0, temperature_bits)
    top_p = _real(reals, index, 1, top_p_bits)
    min_p = _real(reals, index, 2, min_p_bits)
    repetition = _real(reals, index, 3, repetition_bits)
    presence = _real(reals, index, 4, presence_bits)
    frequency = _real(reals, index, 5, frequency_bits)
    top_k = _integer(integers, index, 3, 0, all_top_k)
    seed = _integer(integers, index, 3, 1, all_seed)
    position = _integer(integers, index, 3, 2, all_position)
    row_key = _integer(row_keys, index, 1, 0, all_row)
    if row_keys is None:
        row_key = tl.where(row_key < 0, index, row_key)
    valid = (
        (temperature >= 0) & (temperature < float("inf")) & (top_p > 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)
        & (repetition > 0) & (repetition < float("inf")) & (tl.abs(presence) < float("inf"))
        & (tl.abs(frequency) < float("inf")) & (top_k >= 0) & (position >= 0) & ((row_key >> 32) == 0)
    )  # fmt: skip
    greedy = temperature == 0
    temperature = tl.minimum(tl.maximum(temperature, _LOWEST_TEMPERATURE), _HIGHEST_TEMPERATURE)
    temperature = tl.where(greedy, 1.0, temperature)
    top_k = tl.where(greedy | (top_k == 0) | (top_k > vocab), vocab, top_k)
    top_p = tl.where(greedy, 1.0, top_p)
    lowest_weight = _not_below(tl.where(greedy, 0.0, min_p))
    scale = (1.4426950408889634 / temperature).to(tl.float32)  # math.log2(math.e), to the bit

    # The logits after penalties and bias.
    base = logits + (index * logits_stride)[:, None]
    if bias is not None:
        bias += (index * bias_stride)[:, None]
    if workspace is not None:
        x = workspace + (index * workspace_stride)[:, None]
        maxima, bad = _scan(base, bias, x, vocab, ROWS, COLS)
        if previous is not None:
            unknown = _penalise(
                base, bias, x, previous + (index * previous_count)[:, None], first + (index * previous_count)[:, None],
                previous_count, vocab, live, repetition[:, None], presence[:, None], frequency[:, None], ROWS, COLS,
            )  # fmt: skip
            maxima, bad = _scan(x, None, None, vocab, ROWS, COLS)
            valid = valid & ~unknown
        else:
            tl.debug_barrier()
        base = x
    else:
        maxima, bad = _scan(base, None, None, vocab, ROWS, COLS)
    best = tl.max(maxima, axis=1)
    valid = valid & ~bad & (best > float("-inf"))
    highest = _ordered_bits(best)

    # top-k, and min-p where it comes alone. Of several tiles, the lists stand behind the row in the workspace.
    count = vocab
    lowest = tl.full((ROWS,), _LEAST_KEY, tl.uint32)
    listed = False
    offset = tl.zeros((), tl.int32)
    spare = tl.zeros((), tl.int32)
    SELECT_COLS: tl.constexpr = COLS if TILES == 1 else _LIST_COLS
    filters_k = tl.min(top_k, axis=0) < vocab
    top_k = top_k.to(tl.int32)
    if TILES > 1:  # and so ROWS == 1
        list_offset = (workspace_stride - CAPACITY).to(tl.int32)
        spare = list_offset - CAPACITY
        tokens = list_tokens + (index * CAPACITY)[:, None]
        bound = tl.full((ROWS,), _LEAST_KEY, tl.uint32)
        if filters_k:
            if tl.max(top_k, axis=0) <= COLS:
                tl.store(_at(base, spare) + tl.arange(0, COLS)[None, :], maxima)
                tl.debug_barrier()
                floor = _ordered_bits(tl.min(maxima, axis=1))
                bound = _select(
                    base, spare, tl.minimum(vocab, COLS), floor, highest, _between(floor, highest), top_k, top_p, best,
                    scale, spare, CAPACITY, False, ROWS, SELECT_COLS, TILES,
                )  # fmt: skip
        elif (tl.min(top_p, axis=0) == 1) & (tl.max(lowest_weight, axis=0) > 0):  # a weight's error is far below 1e-4
            logit = best + temperature * (tl.log(lowest_weight.to(tl.float64)) - 1e-4) - 1e-6 * tl.abs(best)
            bound = _ordered_bits(logit.to(tl.float32))
        if tl.max(bound, axis=0) > _LEAST_KEY:
            kept = _collect(base, vocab, bound, highest, _at(base, list_offset), tokens, CAPACITY, COLS)
            if kept <= CAPACITY:
                offset = list_offset
                count = kept
                listed = True
                lowest = bound
    if filters_k:
        lowest = _select(
            base, offset, count, lowest, highest, _between(lowest, highest), top_k, top_p, best, scale, spare, CAPACITY,
            False, ROWS, SELECT_COLS, TILES,
        )  # fmt: skip

    # top-p. Its first thresholds are dense where the probability is.
    if tl.min(top_p, axis=0) < 1:
        number = tl.arange(0, _SPLIT)[None, :]
        part = (number - _SPLIT).to(tl.float32) / _SPLIT  # -1 .. -1/4
        distance = (temperature * (64 * _LN2)).to(tl.float32)
        thresholds = _ordered_bits(best[:, None] + distance[:, None] * (part * part * part))
        thresholds = tl.where(number == 0, lowest[:, None], tl.maximum(thresholds, lowest[:, None]))
        lowest = _select(
            base, offset, count, lowest, highest, thresholds, tl.zeros((ROWS,), tl.int64), top_p, best, scale, spare,
            CAPACITY, True, ROWS, SELECT_COLS, TILES,
        )  # fmt: skip

    # The draw.
    base = _at(base, offset)
    random = core.uniform_bits(seed, row_key, position)
    place, total = _draw(base, count, random, best, scale, _from_ordered_bits(lowest), lowest_weight, ROWS, COLS, TILES)
    if tl.max(greedy.to(tl.int32), axis=0) > 0:
        place = tl.where(greedy, _first_equal(base, count, best, ROWS, COLS), place)
    place = tl.minimum(place, count - 1)[:, None]  # where nothing is valid, nothing was found
    value = tl.load(base + place)
    drawn = place
    if TILES > 1 and listed:
        drawn = tl.load(tokens + place)
    share = (value - best[:, None]).to(tl.float64) / temperature[:, None]
    share -= tl.log(tl.maximum(total, 1).to(tl.float64)[:, None]) - _LOG_UNIT
    # Nobody on the host knows in time to raise an error.
    tl.store(token + row[:, None], tl.where(valid[:, None], drawn.to(tl.int64), -1), mask=live)
    tl.store(log_prob + row[:, None], tl.where(valid[:, None], share.to(tl.float32), float("nan")), mask=live)


_ROW_TILE = 4096  # elements: 8 for each of 512 threads
_SMALL_TILE = 2048  # of several rows, or one; with more, the tables of so many rows take too many registers
_LARGEST_LIST = 4  # a quarter of a row


def sample(
    *, token: Tensor, log_prob: Tensor, logits: Tensor, reals: Tensor | None, integers: Tensor | None,
    row: Tensor | None, previous: Tensor | None, logit_bias: Tensor | None, rows: int, vocab: int, previous_count: int,
    logits_stride: int, bias_stride: int, all_reals: list[float], all_integers: list[int], all_row: int, dtype: int,
) -> None:  # fmt: skip
    if vocab <= _SMALL_TILE:
        cols = max(triton.next_power_of_2(vocab), 16)
        tiles, tile_rows = 1, _SMALL_TILE // cols
        if triton.knobs.runtime.interpret:  # which pays for an operation, not for its elements
            tile_rows *= 8
    else:
        cols, tile_rows = _ROW_TILE, 1
        tiles = triton.next_power_of_2(max(triton.cdiv(vocab, cols), 2))
    capacity = max(triton.next_power_of_2(vocab) // _LARGEST_LIST, _ROW_TILE)
    stride = triton.cdiv(vocab, 16) * 16 + (2 * capacity if tiles > 1 else 0)  # a row and its lists

    def scratch(count: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows * count, dtype=of, device=logits.device)

    if not previous_count:
        previous = None
    workspace = scratch(stride) if previous is not None or logit_bias is not None or dtype or tiles > 1 else None
    first = None if previous is None else scratch(previous_count, torch.int32)
    list_tokens = scratch(capacity, torch.int32) if tiles > 1 else None
    bits = [struct.unpack("<q", struct.pack("<d", value))[0] for value in all_reals]
    launch(
        sample_kernel, (triton.cdiv(rows, tile_rows),), token, log_prob, logits, reals, integers, row, previous,
        logit_bias, workspace, first, list_tokens, rows, vocab, previous_count, logits_stride, bias_stride, stride,
        *bits, *all_integers, all_row, configs=one_config(num_warps=16, num_stages=1), fp_fusion=False, ROWS=tile_rows,
        COLS=cols, TILES=tiles, CAPACITY=capacity,
    )  # fmt: skip
