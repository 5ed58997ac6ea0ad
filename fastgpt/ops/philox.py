"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A random word is a pure function of a 64-bit key and a 128-bit counter, so any thread of any backend computes the same
word without state, order or communication. fastgpt's keys and counters, here and in csrc/core/philox.h:

    key     = (seed mod 2^32, seed div 2^32)
    counter = (position mod 2^32, position div 2^32, row, stream)   sampling
    counter = (key div 8, query, batch * heads + head, stream)      dropout of attention weights

``stream`` is a constant per consumer, so that two consumers with one seed do not share numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as Weyl sequences
_ROUNDS = 10
_MASK = 0xFFFFFFFF

SAMPLE_STREAM = 1
ATTENTION_STREAM = 2


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of constant * word, in halves of 16 bits because int64 has a sign."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for every counter and key, all int64 tensors of one shape with values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform_bits(seed: Tensor, row: Tensor, position: Tensor, stream: int) -> list[int]:
    """One uniform 64-bit integer for every element of seed, row and position (int64, one shape (N,))."""
    counter = (position & _MASK, (position >> 32) & _MASK, row, torch.full_like(row, stream))
    high, low, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return [(h << 32) | w for h, w in zip(high.tolist(), low.tolist(), strict=True)]


def dropout_values(seed: Tensor, first_head: int, heads: int, queries: int, keys: int) -> Tensor:
    """The 16-bit number of every attention weight, int64 (heads, queries, keys): the weight is kept where it is at
    least dropout_p * 65536.

    One call gives the numbers of eight keys, each word's low half before its high half.

    Args:
        seed: int64, one element.
        first_head: batch * heads + head of the first head.
    """
    blocks = -(-keys // 8)
    device = seed.device
    counter = torch.broadcast_tensors(
        torch.arange(blocks, device=device),
        torch.arange(queries, device=device)[:, None],
        torch.arange(first_head, first_head + heads, device=device)[:, None, None],
        torch.tensor(ATTENTION_STREAM, device=device),
    )
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, -1).reshape(heads, queries, blocks * 8)[..., :keys]
