"""Small helpers that several operators' references and kernel calls share."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """To the dtype in which the references compute: float64 stays, all else is float32."""
    return x if x.dtype == torch.float64 else x.float()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """``x`` as rows of its last dimension: (tensor, elements from one row to the next).

    A view whose rows are contiguous and evenly spaced (a slice of the last dimension, say) comes back as it is;
    anything else is copied. A kernel reads row i at ``data_ptr() + i * stride * element_size()``.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    shape, strides = x.shape, x.stride()
    spacing = None  # the distance between rows, once a leading dimension longer than one has been seen
    expected = 0  # the stride that the next dimension outwards must have
    even = strides[-1] == 1 or shape[-1] == 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if spacing is None:
            spacing = stride
        elif stride != expected:
            even = False
        expected = stride * size
    if not even:
        return x.contiguous(), x.shape[-1]
    return x, x.shape[-1] if spacing is None else spacing
