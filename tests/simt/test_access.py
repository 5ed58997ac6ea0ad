"""No kernel moves more sectors, or takes more passes over shared memory, than its budget (csrc/cuda/access.toml)."""

import pytest

from tests.simt import access
from tests.simt.calls import ALIGNED

pytest.importorskip("fastgpt._simt_checked", reason="this build has no emulator (FASTGPT_SIMT=on)")


@pytest.mark.parametrize("op", ALIGNED)
def test_access_stays_within_budget(op):
    budget = access.budget()
    for kernel, measured in access.ratios(access.requests(op)).items():
        assert kernel in budget, f"{kernel} has no budget: python -m tests.simt.access --update, and look at it"
        for what, value in measured.items():
            allowed = budget[kernel].get(what, 1.0)
            assert value <= allowed, (
                f"{kernel}: {what} {value:.3f} x the ideal; the budget is {allowed} (--lines tells where)"
            )
