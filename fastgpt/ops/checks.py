"""Argument checks shared by the operators. Every message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """``tensor`` is a Tensor of a floating dtype that the operators compute in."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; allowed are float32, bfloat16, float16, float64")


def same_device(op: str, name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``tensor`` is where ``other`` is."""
    if tensor.device != other.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but {other_name} is on {other.device}")


def like(
    op: str,
    name: str,
    tensor: torch.Tensor | None,
    other_name: str,
    other: torch.Tensor,
    *,
    float32_too: bool = False,
) -> None:
    """``tensor`` (if given) has the dtype and device of ``other``; with ``float32_too`` it may also be float32."""
    if tensor is None:
        return
    floating(op, name, tensor)
    same_device(op, name, tensor, other_name, other)
    if tensor.dtype != other.dtype and not (float32_too and tensor.dtype == torch.float32):
        also = " or float32" if float32_too and other.dtype != torch.float32 else ""
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be {other.dtype}{also}, as {other_name} is")


def shape(op: str, name: str, tensor: torch.Tensor | None, expected: Sequence[int], meaning: str) -> None:
    """``tensor`` (if given) has exactly the ``expected`` shape, which ``meaning`` explains."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; it must be {tuple(expected)} ({meaning})")


def normalized_shape(op: str, given: Sequence[int], input: torch.Tensor) -> tuple[int, ...]:
    """``given`` as a tuple, which is the non-empty tail of input's shape."""
    wanted = tuple(given)
    if not wanted or tuple(input.shape[-len(wanted) :]) != wanted:
        raise ValueError(
            f"{op}: normalized_shape={wanted} must be the last dimensions of input's shape {tuple(input.shape)}"
        )
    return wanted
