"""Where each sequence of a batch starts: what rotary and embedding share.

A position argument is an int, or an int64 tensor (B,) with one for each of the first dimension of a batch.
"""

from __future__ import annotations

import torch


def split(
    op: str,
    name: str,
    value: int | torch.Tensor,
    batch: torch.Tensor,
    batch_name: str,
    length: int,
    limit: int,
    table: str,
) -> tuple[torch.Tensor | None, int]:
    """Splits the position of each sequence's first token, an int or an int64 tensor (B,), into (tensor or None, int).

    ``batch`` has B as its first dimension; sequences have ``length`` tokens; ``table`` has ``limit`` rows. An int is
    checked against the table here; a tensor where its values are read (``in_range``).
    """
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: {name} has dtype {value.dtype}; it must be an int or an int64 tensor")
        if value.device != batch.device:
            raise ValueError(f"{op}: {name} is on {value.device}, but {batch_name} is on {batch.device}")
        if value.dim() != 1 or value.shape[0] != batch.shape[0]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}; it must be ({batch.shape[0]},), one position for each "
                f"of the first dimension of {batch_name}, whose shape is {tuple(batch.shape)}"
            )
        return value, 0
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int or an int64 tensor, not {type(value).__name__}")
    if value < 0 or value + length > limit:
        raise IndexError(_out_of_range(op, f"{name}={value}", value, length, limit, table))
    return None, value


def in_range(op: str, name: str, value: torch.Tensor, length: int, limit: int, table: str) -> None:
    """Every position offset .. offset + length - 1 is a row of ``table``, which has ``limit`` rows."""
    bad = (value < 0) | (value + length > limit)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        first = int(value[row])
        raise IndexError(_out_of_range(op, f"{name}[{row}]={first}", first, length, limit, table))


def _out_of_range(op: str, what: str, first: int, length: int, limit: int, table: str) -> str:
    return f"{op}: {what} asks for positions {first} to {first + length - 1}; {table} has positions 0 to {limit - 1}"
