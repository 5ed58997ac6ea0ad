"""The error budget that every kernel is held to, in the tests and in ``fastgpt doctor``.

FlashAttention's rule. ``exact`` is torch's own computation in float64 on the inputs as rounded to the dtype under test,
``plain`` is torch's own in that dtype. A kernel may be off by at most twice what ``plain`` is off, plus one rounding of
the output:

    max|kernel - exact| <= 2 max|plain - exact| + u max|exact|,   u = eps / 2 of the output's dtype,

where ``plain`` counts as at least one rounding off, u max|exact|: over a handful of elements it can be exact by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor


def error_and_budget(actual: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """(max|actual - exact|, what it may be). The error is infinite where NaN or infinity stands in the wrong place.

    Where the dtype overflows, infinity is the right answer: ``exact`` is taken as the dtype holds it there.
    """
    if not exact.numel():
        return 0.0, 0.0
    ours, held = actual.double(), exact.to(actual.dtype).double()
    finite = held.isfinite() & plain.isfinite()
    same = (ours == held) | (ours == plain.double()) | (ours.isnan() & (held.isnan() | plain.isnan()))
    if not bool(same[~finite].all()) or not bool(ours[finite].isfinite().all()):
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    rounding = torch.finfo(actual.dtype).eps / 2 * exact[finite].abs().max().item()
    plain_error = (plain.double() - exact)[finite].abs().max().item()
    return (ours - exact)[finite].abs().max().item(), 2 * max(plain_error, rounding) + rounding
