"""attention: softmax(scale Q K^T + mask) V without the L x S matrix in memory (FlashAttention: Dao et al., 2022; 2023).

Shapes: B batch, Hq query heads, H key/value heads, L queries, S keys, E head dim of query and key, Ev of value.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from fastgpt.ops import attention_eager, checks, native, philox, registry
from fastgpt.ops.attention_options import (
    DROPOUT_STEPS,
    NO_CACHE,
    SCHEMA,
    Options,
    check_alibi,
    check_seed,
    check_sinks,
    fields,
    gradient_fields,
    options,
    refusal,
    rows,
    wide,
)
from fastgpt.ops.native import DTYPES, Kernels


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: Literal["top_left", "bottom_right"] = "top_left",
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot product attention, as ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: (..., Hq, L, E); float32, bfloat16, float16 (float64 on the reference). Any strides: views such as a
            (B, T, H, D) projection transposed to (B, H, T, D) are read in place.
        key: (..., H, S, E), of query's dtype.
        value: (..., H, S, Ev), of query's dtype. Leading dimensions may be absent, and they broadcast.
        attn_mask: broadcastable to (..., Hq, L, S). Boolean (True takes part), or float32 or query's dtype (added to
            the scores). One that requires grad gets its gradient, on the reference.
        dropout_p: probability to drop an attention weight, applied whenever positive, as in torch; rounded to a
            multiple of 1 / 65536.
        is_causal: query i sees key j only where j <= i + shift. Combines with ``attn_mask``: a key must pass both.
        scale: of the scores; 1 / sqrt(E) if None.
        enable_gqa: Hq is a multiple of H, and Hq / H consecutive query heads share a key/value head.
        causal_alignment: where the diagonal lies. "top_left" (torch's meaning): shift = 0. "bottom_right": shift =
            S - L, so that the last query sees the last key, which decoding with a cache needs.
        window: (left, right), as in FlashAttention: query i sees key j only where
            i + shift - left <= j <= i + shift + right; -1 is unlimited. ``is_causal`` makes right 0.
        softcap: scores become softcap * tanh(scores / softcap), after the scale and before all else (Gemma 2); 0: none.
        alibi_slopes: (Hq,) or (..., Hq) float32, a constant: -slope * |i + S - L - j| is added to the scores (Press et
            al., 2022; with FlashAttention's shift, whatever ``causal_alignment`` is).
        sinks: (Hq,), float32 or query's dtype: one more logit per head that takes part in the softmax's denominator
            only (gpt-oss; Xiao et al., 2023). A query that sees no key still gives zeros.
        dropout_seed: int64, one element, on query's device. The same seed drops the same weights on every backend
            (counter-based: ``fastgpt/ops/philox.py``). None: drawn from torch's generator.
        backend: see ``fastgpt.ops``.

    Returns:
        (..., Hq, L, Ev) of query's dtype. A query that sees no key gives zeros, and zero gradients.

    Raises:
        TypeError: a dtype that is not allowed. ValueError: shapes or options that do not fit. Each names the argument.
    """
    _check(query, key, value, attn_mask, enable_gqa)
    o = options("attention", query, dropout_p, is_causal, scale, causal_alignment, window, softcap)
    q, k, v, lead = _heads(query, key, value, enable_gqa)
    length, heads = q.shape[2], q.shape[1]
    mask = None if attn_mask is None else _four_dims(attn_mask, lead, length, k.shape[2])
    sinks = check_sinks("attention", sinks, query, heads)
    alibi = check_alibi("attention", alibi_slopes, query, lead)

    why = refusal(query, value)
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        why = "an attn_mask that requires grad"
    chosen = registry.resolve("attention", backend, query.device, why, query.dtype)
    if chosen == "torch" and not o.softcap and sinks is None and alibi is None and dropout_seed is None:
        return attention_eager.scaled_dot_product(query, key, value, attn_mask, dropout_p, enable_gqa, o)
    seed = check_seed("attention", dropout_seed, query, o.dropout_threshold)
    if chosen == "torch":
        out = attention_eager.dense(q, k, v, mask, sinks, alibi, seed, o)
    else:
        out, _ = _op(q, k, v, mask, sinks, alibi, seed, *o, chosen)
    return out if len(lead) == 2 else out.reshape(*lead, length, v.shape[-1])


# --- arguments ---


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
) -> None:
    checks.floating("attention", "query", query)
    checks.like("attention", "key", key, "query", query)
    checks.like("attention", "value", value, "query", query)
    least = 3 if enable_gqa else 2
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < least:
            needs = "(..., heads, length, head dim) with enable_gqa" if enable_gqa else "(..., length, head dim)"
            raise ValueError(f"attention: {name} has shape {tuple(tensor.shape)}; it must be {needs}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"attention: key has shape {tuple(key.shape)}; its last dimension must be {query.shape[-1]}, as in query"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"attention: value has shape {tuple(value.shape)}; its length must be {key.shape[-2]}, as in key"
        )
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"attention: attn_mask must be a Tensor or None, not {type(attn_mask).__name__}")
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise TypeError(
                f"attention: attn_mask has dtype {attn_mask.dtype}; allowed are bool, float32 and query's {query.dtype}"
            )
        if attn_mask.device != query.device:
            raise ValueError(f"attention: attn_mask is on {attn_mask.device}, but query is on {query.device}")


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    if shapes[0] == shapes[1] == shapes[2]:  # nearly always; torch's function takes longer than attention for one token
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        named = ", ".join(f"{name} {shape}" for name, shape in zip(("query", "key", "value"), shapes, strict=True))
        raise ValueError(
            f"attention: the leading dimensions do not broadcast: {named} (different head counts need enable_gqa=True)"
        ) from None


def _heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """(B, Hq, L, E), (B, H, S, E), (B, H, S, Ev), views where possible, and the leading dimensions of the result."""
    q_lead, k_lead, v_lead = (tuple(t.shape[:-2]) for t in (query, key, value))
    if enable_gqa:
        heads, key_heads, value_heads = q_lead[-1], k_lead[-1], v_lead[-1]
        for name, count in (("key", key_heads), ("value", value_heads)):
            if count == 0 or heads % count:
                raise ValueError(f"attention: {name} has {count} heads, which must divide query's {heads} (enable_gqa)")
        if key_heads != value_heads:  # torch takes this too
            key = key.repeat_interleave(heads // key_heads, -3)
            value = value.repeat_interleave(heads // value_heads, -3)
            key_heads = heads
        lead = (*_broadcast(q_lead[:-1], k_lead[:-1], v_lead[:-1]), heads)
    else:
        lead = _broadcast(q_lead, k_lead, v_lead)
        # One key/value head that is broadcast over the query heads is shared by them, not repeated.
        shared = len(lead) > 0 and all(len(s) == 0 or s[-1] == 1 for s in (k_lead, v_lead))
        key_heads = 1 if shared else (lead[-1] if lead else 1)
    heads = lead[-1] if lead else 1
    batch = math.prod(lead[:-1])

    def view(x: Tensor, count: int) -> Tensor:
        if x.dim() == 4 and tuple(x.shape[:2]) == (batch, count) and len(lead) == 2:
            return x
        return x.expand(*lead[:-1], count, *x.shape[-2:]).reshape(batch, count, *x.shape[-2:])

    return view(query, heads), view(key, key_heads), view(value, key_heads), lead


def _four_dims(mask: Tensor, lead: tuple[int, ...], length: int, keys: int) -> Tensor:
    """``mask`` with four dimensions that broadcast to (B, Hq, L, S); broadcast dimensions stay 1 where they can."""
    whole = (*lead, length, keys)
    extra = mask.dim() - len(whole)
    fits = extra <= 0 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(whole), strict=False))
    if not fits:
        raise ValueError(
            f"attention: attn_mask has shape {tuple(mask.shape)}; it must broadcast to {whole} (..., heads, L, S)"
        )
    if mask.dim() < 4:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.dim() > 4 or (len(lead) > 2 and mask.shape[0] != 1):
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
        mask = mask.reshape(math.prod(lead[:-1]), *mask.shape[-3:])
    return mask


def _empty(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """(B, H, L, D) over memory in (B, L, H, D) order, as torch's kernel gives: merging the heads is then a view."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _result(x: Tensor, like: Tensor) -> Tensor:
    return _empty(like, *x.shape).copy_(x)


# --- reference ---


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, H, S, D) with each head repeated for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _positions(length: int, keys: int, device: torch.device, shift: int) -> Tensor:
    """j - (i + shift), (L, S): how far right of its diagonal each key lies."""
    return torch.arange(keys, device=device) - torch.arange(length, device=device)[:, None] - shift


def _scores(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, alibi: Tensor | None, o: Options
) -> tuple[Tensor, Tensor | None]:
    """(scores, t): scale Q K^T, capped, biased and masked, -inf where a key is not seen; t = tanh of the capping."""
    length, keys = q.shape[-2], k.shape[-2]
    scores = o.scale * (q @ k.transpose(-2, -1))
    t = None
    if o.softcap:
        t = torch.tanh(scores / o.softcap)
        scores = o.softcap * t
    if alibi is not None:
        scores = scores - alibi[:, :, None, None] * _positions(length, keys, q.device, keys - length).abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if o.left >= 0 or o.right >= 0:
        position = _positions(length, keys, q.device, keys - length if o.bottom_right else 0)
        if o.left >= 0:
            scores = scores.masked_fill(position < -o.left, -math.inf)
        if o.right >= 0:
            scores = scores.masked_fill(position > o.right, -math.inf)
    return scores, t


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(P, P of the sink, lse). P is zero, with zero derivatives, where a query sees no key and there is no sink."""
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    unseen = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(unseen, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(unseen[..., 0], math.inf)
    p = torch.softmax(scores, -1).masked_fill(unseen, 0.0)
    return (p, None, lse) if sinks is None else (p[..., :-1], p[..., -1:], lse)


def _dropout(p: Tensor, seed: Tensor | None, first_head: int, o: Options) -> Tensor | None:
    """What P is multiplied by: 0, or 65536 / (65536 - threshold); None without dropout."""
    if seed is None:
        return None
    batch, heads, length, keys = p.shape
    values = philox.dropout_values(seed, first_head, batch * heads, length, keys).view(p.shape)
    return (values >= o.dropout_threshold).to(p.dtype) * (DROPOUT_STEPS / max(DROPOUT_STEPS - o.dropout_threshold, 1))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out, lse): P = exp(scores - lse), lse = log(exp(sink) + sum(exp(scores))), out = dropout(P) V.

    A query that sees no key, without a sink, has lse = +inf, so that exp(scores - lse) is zero for it in a kernel's
    backward. ``numbers`` are those of ``Options``; ``first_head`` is where the count of batch * heads + head begins.
    """
    o, dtype, heads = Options(*numbers), wide(query.dtype), query.shape[1]
    q, k, v = query.to(dtype), _grouped(key.to(dtype), heads), _grouped(value.to(dtype), heads)
    scores, _ = _scores(q, k, attn_mask, alibi, o)
    p, _, lse = _softmax(scores, sinks)
    multiplier = _dropout(p, seed, first_head, o)
    if multiplier is not None:
        p = p * multiplier
    return _result(p @ v, query), lse


def reference_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
    first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, dmask, dsinks). With P recomputed (from the scores alone, which keeps second derivatives right):

    dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O),  dS = P * (dP - delta),  dmask = dS,
    dQ = scale dS K,  dK = scale dS^T Q, with dS times 1 - t^2 where the scores are capped: t = tanh(scores / softcap),
    dsink = -sum(P_sink * delta) over the batch and the queries.
    Dropout multiplies P in dV, and dP, by what it multiplied P by. Heads that share a key/value head add up.
    """
    *settings, mask_grad = numbers
    o, dtype, heads = Options(*settings), wide(query.dtype), query.shape[1]
    q, k, v = query.to(dtype), _grouped(key.to(dtype), heads), _grouped(value.to(dtype), heads)
    do = dout.to(dtype)
    scores, t = _scores(q, k, attn_mask, alibi, o)
    p, p_sink, _ = _softmax(scores, sinks)
    multiplier = _dropout(p, seed, first_head, o)
    dp = do @ v.transpose(-2, -1)
    if multiplier is None:
        dv = p.transpose(-2, -1) @ do
    else:
        dv = (p * multiplier).transpose(-2, -1) @ do
        dp = dp * multiplier
    delta = (do * out.to(dtype)).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    dmask, dsinks = query.new_empty(0), query.new_empty(0)
    if mask_grad and attn_mask is not None:
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if p_sink is not None:
        dsinks = -(p_sink * delta).sum((0, 2, 3))
    if t is not None:
        ds = ds * (1 - t * t)
    dq = o.scale * (ds @ k)
    dk = o.scale * (ds.transpose(-2, -1) @ q)
    if key.shape[1] != heads:
        dk = dk.unflatten(1, (key.shape[1], -1)).sum(2)
        dv = dv.unflatten(1, (key.shape[1], -1)).sum(2)
    return _result(dq, query), _result(dk, query), _result(dv, query), dmask, dsinks


# --- kernels ---


def native_forward(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:
    query, key, value = rows(query), rows(key), rows(value)
    batch, heads, length, _ = query.shape
    out = _empty(query, batch, heads, length, value.shape[-1])
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if not out.numel() or not key.shape[2]:
        return out.zero_(), lse.copy_(sinks[:, None]) if sinks is not None else lse.fill_(math.inf)
    kernels.attention_forward(
        **{
            **fields(query, key, value, sinks, alibi, seed, Options(*numbers)),
            **_mask_fields(attn_mask, query, key),
            **NO_CACHE,
            "out": out,
            "lse": lse,
            "out_strides": out.stride()[:3],
        }
    )
    return out, lse


def native_backward(
    kernels: Kernels,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *settings, mask_grad = numbers
    assert not mask_grad  # refused by attention()
    query, key, value, out, dout = (rows(x) for x in (query, key, value, out, dout))
    dq, dk, dv = (_empty(query, *x.shape) for x in (query, key, value))
    dmask = query.new_empty(0)
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    if not out.numel() or not key.shape[2]:
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask, dsinks.zero_()
    kernels.attention_backward(
        **{
            **fields(query, key, value, sinks, alibi, seed, Options(*settings)),
            **_mask_fields(attn_mask, query, key),
            **gradient_fields(
                _strides, lse, None if sinks is None else dsinks, dq=dq, dk=dk, dv=dv, dout=dout, out=out
            ),
        }
    )
    return dq, dk, dv, dmask, dsinks


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of batch, head and row in (B, H, T, D)."""
    return x.stride()[:3]


def _mask_fields(mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Any]:
    if mask is None:
        return {}
    whole = mask.expand(*query.shape[:3], key.shape[2])
    boolean = mask.dtype == torch.bool
    return {
        "mask": whole,
        "mask_strides": whole.stride(),
        "mask_dtype": 0 if boolean else DTYPES[mask.dtype],
        "mask_bool": boolean,
    }


# --- registration ---


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=wide(query.dtype))
    return _empty(query, batch, heads, length, value.shape[-1]), lse


def _fake_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dmask = torch.empty_like(attn_mask) if rest[-1] and attn_mask is not None else query.new_empty(0)
    dsinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return _empty(query, *query.shape), _empty(query, *key.shape), _empty(query, *value.shape), dmask, dsinks


class _Attention(torch.autograd.Function):
    """``numbers`` are those of ``Options`` and the backend."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        alibi: Tensor | None,
        seed: Tensor | None,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor]:
        tensors = (query, key, value, attn_mask, sinks, alibi, seed)
        out, lse = registry.below_autograd(_op, *tensors, *numbers)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.numbers = numbers
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *numbers, backend = ctx.numbers
        mask_grad, sinks_grad = ctx.needs_input_grad[3:5]
        dq, dk, dv, dmask, dsinks = _op_backward(dout, *ctx.saved_tensors, *numbers, mask_grad, backend)
        rest = (None,) * (2 + len(ctx.numbers))
        return dq, dk, dv, dmask if mask_grad else None, dsinks if sinks_grad else None, *rest


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? sinks, Tensor? alibi, Tensor? seed"
_op = registry.define(
    "attention",
    f"({_TENSORS}, {SCHEMA}) -> (Tensor, Tensor)",
    {"reference": reference, **native.backends(native_forward)},
    _fake,
    _Attention,
)
_op_backward = registry.define(
    "attention_backward",
    f"(Tensor dout, {_TENSORS}, Tensor out, Tensor lse, {SCHEMA}, bool mask_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(native_backward)},
    _fake_backward,
)
