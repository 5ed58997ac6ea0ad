"""layer_norm, forward and backward, with the residual addition fused (Ba, Kiros and Hinton, 2016).

    s = x + residual,  mean = sum(s) / C,  var = sum((s - mean)^2) / C,  y = (s - mean) * rstd * w + b
    with xhat = (s - mean) * rstd and g = dy * w:
    ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum,  dw = sum_rows(dy * xhat),  db = sum_rows(dy)

Bytes, and how rows are shared out: see norm.py.
"""

from torch import Tensor

from fastgpt.kernels.norm import norm_backward, norm_forward


def layer_norm_forward(
    *, y: Tensor, sum: Tensor | None, mean: Tensor, rstd: Tensor, x: Tensor, residual: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, rows: int, cols: int, eps: float, dtype: int, weight_dtype: int,
) -> None:  # fmt: skip
    norm_forward(y, sum, mean, rstd, x, residual, weight, bias, rows, cols, eps)


def layer_norm_backward(
    *, dx: Tensor, dweight: Tensor | None, dbias: Tensor | None, dy: Tensor, dsum: Tensor | None, x: Tensor,
    weight: Tensor | None, mean: Tensor, rstd: Tensor, rows: int, cols: int, dtype: int, weight_dtype: int,
) -> None:  # fmt: skip
    norm_backward(dx, dweight, dbias, dy, dsum, x, weight, mean, rstd, rows, cols)
