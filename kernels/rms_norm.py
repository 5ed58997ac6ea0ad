"""rms_norm, forward and backward, with the residual addition fused (Zhang and Sennrich, 2019).

    s = x + residual,  rstd = 1 / sqrt(sum(s^2) / C + eps),  y = s * rstd * w
    with xhat = s * rstd and g = dy * w:  ds = rstd * (g - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat)

Bytes, and how rows are shared out: see norm.py.
"""

from torch import Tensor

from fastgpt.kernels.norm import norm_backward, norm_forward


def rms_norm_forward(
    *, y: Tensor, sum: Tensor | None, rstd: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor | None,
    rows: int, cols: int, eps: float, dtype: int, weight_dtype: int,
) -> None:  # fmt: skip
    norm_forward(y, sum, None, rstd, x, residual, weight, None, rows, cols, eps)


def rms_norm_backward(
    *, dx: Tensor, dweight: Tensor | None, dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor | None,
    rstd: Tensor, rows: int, cols: int, dtype: int, weight_dtype: int,
) -> None:  # fmt: skip
    norm_backward(dx, dweight, None, dy, dsum, x, weight, None, rstd, rows, cols)
