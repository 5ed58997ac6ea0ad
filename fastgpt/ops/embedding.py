"""embedding: y[n, t] = weight[input[n, t]] + position_weight[offset + t]; the sum is optional.

Shapes: N sequences (all leading dimensions of input), T tokens in each, C model width, V vocabulary, P positions.
The gradient of a row of weight is the sum of its tokens' gradients in token order, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, native, positions, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype, with_huge_pages
from fastgpt.ops.numerics import accumulate, as_rows

NO_PADDING = -1  # of padding
NOT_WANTED = -1  # of vocabulary and positions in the backward: leaves that gradient out


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    position_weight: Tensor | None = None,
    position_offset: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """Rows of ``weight`` for the tokens ``input``, as ``torch.nn.functional.embedding``; with learned positions added.

    Args:
        input: tokens, int64 or int32, of any shape; (..., T) with ``position_weight``.
        weight: (V, C), float32, bfloat16, float16 (float64 on the reference).
        padding_idx: this row gets no gradient; -V <= padding_idx < V.
        max_norm, norm_type: rows used here whose ``norm_type``-norm exceeds ``max_norm`` are first scaled down to it,
            in place.
        scale_grad_by_freq: divides the gradient of a row by the number of its tokens in ``input``.
        sparse: makes the gradient of ``weight`` a sparse tensor of the rows that occur in ``input``, coalesced; not
            under torch.compile.
        position_weight: (P, C), of weight's dtype; its row ``position_offset + t`` is added to token t.
        position_offset: an int, or an int64 tensor (B,) with one for each of input's first dimension.
        backend: see ``fastgpt.ops``.

    Returns:
        (*input.shape, C) of weight's dtype.

    Raises:
        IndexError: a token outside the vocabulary, or a position outside ``position_weight``. On a GPU the caller would
            have to wait for the kernel to learn of one in a tensor: there that row of the result is NaN, and the
            gradients leave it out. (An int ``position_offset`` is checked everywhere.)
        TypeError, ValueError: a dtype, device or shape that does not fit.
    """
    checks.floating("embedding", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight has shape {tuple(weight.shape)}; it must be (V, C)")
    if not isinstance(input, Tensor) or input.dtype not in (torch.int64, torch.int32):
        kind = f"dtype {input.dtype}" if isinstance(input, Tensor) else f"type {type(input).__name__}"
        raise TypeError(f"embedding: input has {kind}; it must be a Tensor of int64 or int32 tokens")
    if input.device != weight.device:
        raise ValueError(f"embedding: input is on {input.device}, but weight is on {weight.device}")
    vocabulary, width = weight.shape
    padding = NO_PADDING
    if padding_idx is not None:
        if not -vocabulary <= padding_idx < vocabulary:
            raise ValueError(f"embedding: padding_idx={padding_idx}; it must be in [{-vocabulary}, {vocabulary})")
        padding = padding_idx % vocabulary
    starts, start = None, 0
    if position_weight is not None:
        checks.like("embedding", "position_weight", position_weight, "weight", weight)
        if position_weight.dim() != 2 or position_weight.shape[1] != width:
            raise ValueError(
                f"embedding: position_weight has shape {tuple(position_weight.shape)}; it must be (P, {width})"
            )
        needed = 2 if isinstance(position_offset, Tensor) else 1
        if input.dim() < needed:
            raise ValueError(
                f"embedding: input has shape {tuple(input.shape)}; position_weight needs (..., T), and a tensor "
                "position_offset needs (B, ..., T)"
            )
        starts, start = positions.split(
            "embedding",
            "position_offset",
            position_offset,
            input,
            "input",
            input.shape[-1],
            position_weight.shape[0],
            "position_weight",
        )
    elif isinstance(position_offset, Tensor) or position_offset != 0:
        raise ValueError("embedding: position_offset is given without position_weight")

    chosen = registry.resolve("embedding", backend, weight.device, unsupported_dtype(weight))
    if chosen == "torch":
        y = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return y if position_weight is None else y + _position_rows(position_weight, input, starts, start)
    if sparse and torch.compiler.is_compiling():
        raise NotImplementedError("embedding: sparse=True, whose gradient has no fixed size, cannot be compiled")
    if max_norm is not None:
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)
    run = _SparseEmbedding.apply if sparse and torch.is_grad_enabled() and weight.requires_grad else _op
    return run(input, weight, position_weight, starts, start, padding, scale_grad_by_freq, chosen)


def torch_eager(
    input: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    starts: Tensor | None,
    start: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """The same with torch.nn.functional."""
    y = F.embedding(input, weight, None if padding == NO_PADDING else padding, scale_grad_by_freq=scale_grad_by_freq)
    return y if position_weight is None else y + _position_rows(position_weight, input, starts, start)


# --- reference ---


def _position_rows(position_weight: Tensor, input: Tensor, starts: Tensor | None, start: int) -> Tensor:
    """The rows of ``position_weight`` for input's tokens, broadcastable to (..., T, C)."""
    length = input.shape[-1]
    if starts is None:
        return position_weight[start : start + length]
    _check_starts(input, starts, position_weight.shape[0])
    rows = position_weight[starts[:, None] + torch.arange(length, device=input.device)]
    return rows.reshape(input.shape[0], *(1,) * (input.dim() - 2), length, -1)


def _check_starts(input: Tensor, starts: Tensor, position_rows: int) -> None:
    positions.in_range("embedding", "position_offset", starts, input.shape[-1], position_rows, "position_weight")


def _check_tokens(input: Tensor, vocabulary: int) -> None:
    bad = (input < 0) | (input >= vocabulary)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise IndexError(
            f"embedding: input{list(where) or ''} is {int(input[where])}; weight has tokens 0 to {vocabulary - 1}"
        )


def reference(
    input: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    starts: Tensor | None,
    start: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """``padding`` and ``scale_grad_by_freq`` concern only the gradient."""
    _check_tokens(input, weight.shape[0])
    y = weight[input]
    return y if position_weight is None else y + _position_rows(position_weight, input, starts, start)


def reference_backward(
    dy: Tensor,
    input: Tensor,
    starts: Tensor | None,
    start: int,
    vocabulary: int,
    positions: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor]:
    """(dweight, dposition_weight); where not wanted, empty."""
    width = dy.shape[-1]
    dweight = dposition = dy.new_empty(0)
    if vocabulary != NOT_WANTED:
        token, d = input.flatten().long(), accumulate(dy).reshape(input.numel(), width)
        if scale_grad_by_freq:
            d = d / token.bincount(minlength=vocabulary)[token, None]
        dweight = d.new_zeros(vocabulary, width).index_add_(0, token, d)
        if padding != NO_PADDING:
            dweight[padding] = 0
        dweight = dweight.to(dy.dtype)
    if positions != NOT_WANTED:
        length = input.shape[-1]
        first = start if starts is None else starts.reshape(-1, *(1,) * (input.dim() - 1))
        position = first + torch.arange(length, device=input.device)
        position = position.expand(input.shape).flatten()
        d = accumulate(dy).reshape(input.numel(), width)
        dposition = d.new_zeros(positions, width).index_add_(0, position, d).to(dy.dtype)
    return dweight, dposition


# --- kernels ---


def _sequences(input: Tensor, starts: Tensor | None, start: int) -> dict[str, Any]:
    """The fields of the kernels that say which tokens and positions there are."""
    length = input.shape[-1] if input.dim() else 1
    sequences = input.numel() // length
    return {
        "tokens": input,
        "starts": starts,
        "start": start,
        "sequences": sequences,
        "sequences_per_start": 1 if starts is None else sequences // starts.numel(),
        "length": length,
        "wide_tokens": input.dtype == torch.int64,
    }


def _explain_bad_index(input: Tensor, vocabulary: int, starts: Tensor | None, position_rows: int) -> None:
    """Raises what the kernel found, in the caller's terms."""
    _check_tokens(input, vocabulary)
    if starts is not None:
        _check_starts(input, starts, position_rows)


def _native(
    kernels: Kernels,
    input: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    starts: Tensor | None,
    start: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    vocabulary, width = weight.shape
    y = weight.new_empty(*input.shape, width)
    if not y.numel():  # there may still be tokens to check
        return (
            y
            if native.asynchronous(kernels)
            else reference(input, weight, position_weight, starts, start, padding, scale_grad_by_freq)
        )
    input = input.contiguous()
    starts = None if starts is None else starts.contiguous()
    weight, weight_stride = as_rows(weight)
    position_stride = 0
    if position_weight is not None:
        position_weight, position_stride = as_rows(position_weight)
    position_rows = 0 if position_weight is None else position_weight.shape[0]
    try:
        kernels.embedding_forward(
            y=y,
            weight=weight,
            position_weight=position_weight,
            **_sequences(input, starts, start),
            width=width,
            vocabulary=vocabulary,
            positions=position_rows,
            weight_stride=weight_stride,
            position_stride=position_stride,
            dtype=DTYPES[weight.dtype],
        )
    except IndexError:
        _explain_bad_index(input, vocabulary, starts, position_rows)
        raise
    return y


def _native_backward(
    kernels: Kernels,
    dy: Tensor,
    input: Tensor,
    starts: Tensor | None,
    start: int,
    vocabulary: int,
    positions: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor]:
    if not dy.numel():
        return reference_backward(dy, input, starts, start, vocabulary, positions, padding, scale_grad_by_freq)
    dweight, dposition = _fake_backward(dy, input, starts, start, vocabulary, positions, padding, scale_grad_by_freq)
    dweight = with_huge_pages(dweight)  # GPT-2's is 154 MB, nearly all of it zeros to write
    dy, dy_stride = as_rows(dy)
    input = input.contiguous()
    starts = None if starts is None else starts.contiguous()
    try:
        kernels.embedding_backward(
            dweight=None if vocabulary == NOT_WANTED else dweight,
            dposition_weight=None if positions == NOT_WANTED else dposition,
            dy=dy,
            **_sequences(input, starts, start),
            width=dy.shape[-1],
            vocabulary=vocabulary,
            positions=positions,
            dy_stride=dy_stride,
            padding=padding,
            scale_grad_by_freq=scale_grad_by_freq,
            dtype=DTYPES[dy.dtype],
        )
    except IndexError:
        _explain_bad_index(input, vocabulary, starts, positions)
        raise
    return dweight, dposition


# --- registration ---


def _fake(
    input: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    starts: Tensor | None,
    start: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    return weight.new_empty(*input.shape, weight.shape[1])


def _fake_backward(
    dy: Tensor,
    input: Tensor,
    starts: Tensor | None,
    start: int,
    vocabulary: int,
    positions: int,
    padding: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor]:
    none, width = dy.new_empty(0), dy.shape[-1]
    return (
        none if vocabulary == NOT_WANTED else dy.new_empty(vocabulary, width),
        none if positions == NOT_WANTED else dy.new_empty(positions, width),
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        position_weight: Tensor | None,
        starts: Tensor | None,
        start: int,
        padding: int,
        scale_grad_by_freq: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(input, starts)
        ctx.vocabulary = weight.shape[0]
        ctx.positions = NOT_WANTED if position_weight is None else position_weight.shape[0]
        ctx.options = (padding, scale_grad_by_freq, backend)
        ctx.start = start
        return registry.below_autograd(
            _op, input, weight, position_weight, starts, start, padding, scale_grad_by_freq, backend
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, starts = ctx.saved_tensors
        weight_wanted, position_wanted = ctx.needs_input_grad[1:3]
        vocabulary = ctx.vocabulary if weight_wanted else NOT_WANTED
        positions = ctx.positions if position_wanted else NOT_WANTED
        dweight, dposition = _op_backward(dy, input, starts, ctx.start, vocabulary, positions, *ctx.options)
        return None, dweight if weight_wanted else None, dposition if position_wanted else None, *(None,) * 5


class _SparseEmbedding(_Embedding):
    """The gradient of weight as a sparse tensor. It is no operator's result: a graph would have to know its size."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, starts = ctx.saved_tensors
        padding, *options = ctx.options
        tokens, numbers = input.unique(return_inverse=True)  # in ascending order
        if padding != NO_PADDING:
            padding = next(iter((tokens == padding).nonzero()[:, 0].tolist()), NO_PADDING)
        positions = ctx.positions if ctx.needs_input_grad[2] else NOT_WANTED
        rows, dposition = _op_backward(dy, numbers, starts, ctx.start, len(tokens), positions, padding, *options)
        known = (tokens >= 0) & (tokens < ctx.vocabulary)  # on a GPU nobody has refused the others
        dweight = torch.sparse_coo_tensor(
            tokens[known][None].long(),
            rows if known.all() else rows[known],
            (ctx.vocabulary, rows.shape[1]),
            is_coalesced=True,
            check_invariants=False,
        )
        return None, dweight, dposition if positions != NOT_WANTED else None, *(None,) * 5


_op = registry.define(
    "embedding",
    "(Tensor input, Tensor weight, Tensor? position_weight, Tensor? starts, SymInt start, int padding,"
    " bool scale_grad_by_freq) -> Tensor",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _Embedding,
)
_op_backward = registry.define(
    "embedding_backward",
    "(Tensor dy, Tensor input, Tensor? starts, SymInt start, SymInt vocabulary, SymInt positions, int padding,"
    " bool scale_grad_by_freq) -> (Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
