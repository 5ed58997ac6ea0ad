"""attention_varlen: attention of sequences of different lengths, packed end to end with no padding between them.

Shapes: B sequences, Hq query heads, H key/value heads, E head dim of query and key, Ev of value. Sequence b has the
queries cu_seqlens_q[b] .. cu_seqlens_q[b + 1] and the keys cu_seqlens_k[b] .. cu_seqlens_k[b + 1] of the packed rows.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastgpt.ops import attention_eager, checks, native, registry
from fastgpt.ops.attention import reference, reference_backward
from fastgpt.ops.attention_options import (
    NO_CACHE,
    SCHEMA,
    Options,
    check_alibi,
    check_indices,
    check_pairs,
    check_seed,
    check_sinks,
    fields,
    gradient_fields,
    options,
    refusal,
    rows,
    slopes_of,
    wide,
)
from fastgpt.ops.native import Kernels

_NAME = "attention_varlen"


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_alignment: Literal["top_left", "bottom_right"] = "bottom_right",
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention within each of B packed sequences, as FlashAttention's ``flash_attn_varlen_func``.

    Each sequence's rows get what ``attention`` gives for that sequence alone, options included; its window, causal
    diagonal and ALiBi distances are by the sequence's own lengths.

    Args:
        query: (total_q, Hq, E); float32, bfloat16, float16 (float64 on the reference). Views of a (total, 3, H, E)
            projection are read in place.
        key: (total_k, H, E), of query's dtype. Hq is a multiple of H: consecutive query heads share a key/value head.
        value: (total_k, H, Ev), of query's dtype.
        cu_seqlens_q: (B + 1,) int32: 0, then where each sequence's queries end. Rows past the last are of no sequence.
        cu_seqlens_k: (B + 1,) int32: the same of the keys.
        max_seqlen_q, max_seqlen_k: no sequence has more queries or keys.
        causal_alignment: "bottom_right" as in FlashAttention: the last query of a sequence sees its last key.
        alibi_slopes: (Hq,) or (B, Hq).
        dropout_p, is_causal, scale, window, softcap, sinks, dropout_seed: see ``attention``.
        backend: see ``fastgpt.ops``.

    Returns:
        (total_q, Hq, Ev) of query's dtype. Rows of no sequence, and queries that see no key, give zeros and zero
        gradients.

    Raises:
        TypeError: a dtype that is not allowed. ValueError: shapes or options that do not fit. Each names the argument.
        On the CPU also cu_seqlens that do not ascend from 0 to the number of rows at most, or exceed max_seqlen; on a
        GPU their values are not looked at, which would make it wait.
    """
    batch = _check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    heads = query.shape[1]
    o = options(_NAME, query, dropout_p, is_causal, scale, causal_alignment, window, softcap)
    sinks = check_sinks(_NAME, sinks, query, heads)
    alibi = check_alibi(_NAME, alibi_slopes, query, (batch, heads))
    chosen = registry.resolve(_NAME, backend, query.device, refusal(query, value), query.dtype)
    seed = check_seed(_NAME, dropout_seed, query, o.dropout_threshold)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    if chosen == "torch":
        return attention_eager.packed(query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi, seed, o)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi, seed)
    out, _ = _op(*tensors, max_seqlen_q, max_seqlen_k, *o, chosen)
    return out


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> int:
    """The number of sequences."""
    checks.floating(_NAME, "query", query)
    checks.like(_NAME, "key", key, "query", query)
    checks.like(_NAME, "value", value, "query", query)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(tensor.shape)}; it must be (total, heads, head dim)")
    check_pairs(_NAME, query, ("key", "value"), key, value)
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_indices(_NAME, name, tensor, query, 1)
        if not tensor.shape[0]:
            raise ValueError(f"{_NAME}: {name} is empty; it must hold 0 and then the end of each sequence")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{_NAME}: cu_seqlens_k has {cu_seqlens_k.shape[0]} elements; it must have {cu_seqlens_q.shape[0]}, as "
            "cu_seqlens_q has"
        )
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(most, int):
            raise TypeError(f"{_NAME}: {name} must be an int, not {type(most).__name__}")
        if most < 0:
            raise ValueError(f"{_NAME}: {name}={most} must not be negative")
    return cu_seqlens_q.shape[0] - 1


def _bounds(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[tuple[int, int]]:
    """(begin, end) of every sequence, checked. Waits for the device that holds ``cu_seqlens``."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{_NAME}: cu_seqlens_{name}[0] is {ends[0]}; it must be 0")
    pairs = list(itertools.pairwise(ends))
    for b, (begin, end) in enumerate(pairs):
        if end < begin:
            raise ValueError(f"{_NAME}: cu_seqlens_{name}[{b + 1}]={end} is below the {begin} before it")
        if end - begin > max_seqlen:
            raise ValueError(
                f"{_NAME}: cu_seqlens_{name}[{b}] .. [{b + 1}] is a sequence of {end - begin}, above "
                f"max_seqlen_{name}={max_seqlen}"
            )
    if ends[-1] > total:
        raise ValueError(f"{_NAME}: cu_seqlens_{name}[{len(pairs)}]={ends[-1]} is above the number of rows, {total}")
    return pairs


# --- reference: one sequence after the other ---


def _heads_first(x: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return x.transpose(0, 1)[None]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    total, heads, _ = query.shape
    out = query.new_zeros(total, heads, value.shape[-1])
    lse = query.new_full((heads, total), math.inf, dtype=wide(query.dtype))
    queries = _bounds("q", cu_seqlens_q, total, max_seqlen_q)
    keys = _bounds("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(queries, keys, strict=True)):
        q, k, v = (_heads_first(x) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        o, row_lse = reference(q, k, v, None, sinks, slopes_of(alibi, b), seed, *numbers, first_head=b * heads)
        out[q0:q1], lse[:, q0:q1] = o[0].transpose(0, 1), row_lse[0]
    return out, lse


def _reference_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heads = query.shape[1]
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    dsinks = query.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    queries = _bounds("q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    keys = _bounds("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(queries, keys, strict=True)):
        do, q, o = (_heads_first(x[q0:q1]) for x in (dout, query, out))
        k, v = (_heads_first(x[k0:k1]) for x in (key, value))
        slopes, row_lse = slopes_of(alibi, b), lse[None, :, q0:q1]
        gradients = reference_backward(
            do, q, k, v, None, sinks, slopes, seed, o, row_lse, *numbers, False, first_head=b * heads
        )
        dq[q0:q1], dk[k0:k1], dv[k0:k1] = (g[0].transpose(0, 1) for g in gradients[:3])
        if sinks is not None:
            dsinks = dsinks + gradients[4]
    return dq, dk, dv, dsinks


# --- kernels ---


def _fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    o: Options,
) -> dict[str, Any]:
    total = query.shape[0]
    return {
        **fields(_heads_first(query), _heads_first(key), _heads_first(value), sinks, alibi, seed, o),
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "batch": cu_seqlens_q.shape[0] - 1,
        "queries": min(max_seqlen_q, total),
        "keys": min(max_seqlen_k, key.shape[0]),
        "total_queries": total,
        "total_keys": key.shape[0],
        "q_strides": _strides(query),
        "k_strides": _strides(key),
        "v_strides": _strides(value),
        "lse_strides": (0, total),
    }


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and row in (T, H, D)."""
    return 0, x.stride(1), x.stride(0)


def _native(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    query, key, value = rows(query), rows(key), rows(value)
    total, heads, _ = query.shape
    if query.device.type == "cpu":
        _bounds("q", cu_seqlens_q, total, max_seqlen_q)
        _bounds("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    out = query.new_zeros(total, heads, value.shape[-1])  # rows of no sequence stay zero
    lse = query.new_full((heads, total), math.inf, dtype=torch.float32)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi, seed)
    common = _fields(*tensors, max_seqlen_q, max_seqlen_k, Options(*numbers))
    if out.numel() and common["batch"] and common["queries"] and common["keys"]:
        kernels.attention_forward(
            **{
                **common,
                **NO_CACHE,
                "out": out,
                "lse": lse,
                "out_strides": _strides(out),
            }
        )
    return out, lse


def _native_backward(
    kernels: Kernels,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, out, dout = (rows(x) for x in (query, key, value, out, dout))
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    dsinks = query.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi, seed)
    common = _fields(*tensors, max_seqlen_q, max_seqlen_k, Options(*numbers))
    if out.numel() and common["batch"] and common["queries"] and common["keys"]:
        kernels.attention_backward(
            **{
                **common,
                **gradient_fields(
                    _strides, lse, None if sinks is None else dsinks, dq=dq, dk=dk, dv=dv, dout=dout, out=out
                ),
            }
        )
    return dq, dk, dv, dsinks


# --- registration ---


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    total, heads, _ = query.shape
    return query.new_empty(total, heads, value.shape[-1]), query.new_empty(heads, total, dtype=wide(query.dtype))


def _fake_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv, query.new_empty(0) if sinks is None else torch.empty_like(sinks)


class _AttentionVarlen(torch.autograd.Function):
    """``numbers`` are the two lengths, those of ``Options``, and the backend."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        sinks: Tensor | None,
        alibi: Tensor | None,
        seed: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, alibi, seed)
        out, lse = registry.below_autograd(_op, *tensors, *numbers)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv, dsinks = _op_backward(dout, *ctx.saved_tensors, *ctx.numbers)
        rest = (None,) * (2 + len(ctx.numbers))
        return dq, dk, dv, None, None, dsinks if ctx.needs_input_grad[5] else None, *rest


_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sinks, Tensor? alibi,"
    " Tensor? seed"
)
_NUMBERS = f"int max_seqlen_q, int max_seqlen_k, {SCHEMA}"
_op = registry.define(
    _NAME,
    f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)",
    {"reference": _reference, **native.backends(_native)},
    _fake,
    _AttentionVarlen,
)
_op_backward = registry.define(
    f"{_NAME}_backward",
    f"(Tensor dout, {_TENSORS}, Tensor out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": _reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
