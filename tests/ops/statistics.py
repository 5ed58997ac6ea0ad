"""Judging samplers: Pearson's chi-square against the exact distribution, bounded as Bonferroni would.

Seeds are fixed, so a test never flickers; the bound says how surprising a failure would be, had the seed been drawn
afresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

FALSE_ALARM = 1e-6  # of a whole family of tests, had their seeds been drawn afresh


def chi_square_p_value(observed: Tensor, expected: Tensor) -> float:
    """The probability of counts at least this far from ``expected``, were it the truth.

    Cells that expect fewer than five counts are judged together, as the approximation asks.
    """
    observed, expected = observed.double(), expected.double()
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor(max(len(expected) - 1, 1), dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def assert_follows(draws: Tensor, probabilities: Tensor, tests: int = 1) -> None:
    """``draws`` (any shape, integers) come from ``probabilities`` (V,), as one of a family of ``tests`` tests."""
    counts = torch.bincount(draws.reshape(-1), minlength=len(probabilities))
    assert len(counts) == len(probabilities), "a draw lies outside the distribution"
    impossible = counts[probabilities == 0]
    assert not impossible.any(), "something of probability 0 was drawn"
    p = chi_square_p_value(counts, probabilities * draws.numel())
    assert p > FALSE_ALARM / tests, f"chi-square: p = {p:.1e} over {draws.numel()} draws"
