import pytest
import torch

from tests.ops import statistics


def test_p_value_agrees_with_the_tables():
    # 0.05 and 0.001 quantiles of chi-square with 1 and 4 degrees of freedom
    for freedom, quantile, p in ((1, 3.841, 0.05), (4, 9.488, 0.05), (4, 18.467, 0.001)):
        expected = torch.full((freedom + 1,), 1e4)
        observed = expected.clone()
        shift = (quantile * 1e4 / 2) ** 0.5
        observed[0] += shift
        observed[1] -= shift
        assert statistics.chi_square_p_value(observed, expected) == pytest.approx(p, rel=1e-2)


def test_a_fair_die_passes_and_a_loaded_one_fails():
    fair = torch.full((6,), 1 / 6)
    loaded = torch.tensor([0.2, 0.16, 0.16, 0.16, 0.16, 0.16])
    draws = torch.multinomial(loaded, 20000, replacement=True, generator=torch.Generator().manual_seed(1))
    statistics.assert_follows(draws, loaded)
    with pytest.raises(AssertionError, match="chi-square"):
        statistics.assert_follows(draws, fair)
    with pytest.raises(AssertionError, match="probability 0"):
        statistics.assert_follows(draws, torch.tensor([0.0, 0.2, 0.2, 0.2, 0.2, 0.2]))
    with pytest.raises(AssertionError, match="outside"):
        statistics.assert_follows(draws, fair[:5])
