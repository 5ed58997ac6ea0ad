"""attention: softmax(scale Q K^T + mask) V without the L x S matrix in memory (FlashAttention: Dao et al., 2022; 2023).

Shapes: B batch, Hq query heads, H key/value heads, L queries, S keys, E head dim of query and key, Ev of value.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import checks, native, registry
from fastgpt.ops.native import DTYPES, Kernels, pointer, unsupported_dtype

_MAX_HEAD_DIM = 256  # of the fused kernels


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
        dropout_p: probability to drop an attention weight, applied whenever positive, as in torch; on the reference.
        is_causal: query i sees key j only where j <= i + shift. Combines with ``attn_mask``: a key must pass both.
        scale: of the scores; 1 / sqrt(E) if None.
        enable_gqa: Hq is a multiple of H, and Hq / H consecutive query heads share a key/value head.
        causal_alignment: where the diagonal lies. "top_left" (torch's meaning): shift = 0. "bottom_right": shift =
            S - L, so that the last query sees the last key, which decoding with a cache needs.
        window: (left, right), as in FlashAttention: query i sees key j only where
            i + shift - left <= j <= i + shift + right; -1 is unlimited. ``is_causal`` makes right 0.
        backend: see ``fastgpt.ops``.

    Returns:
        (..., Hq, L, Ev) of query's dtype. A query that sees no key gives zeros, and zero gradients.

    Raises:
        TypeError: a dtype that is not allowed. ValueError: shapes or options that do not fit. Each names the argument.
    """
    _check(query, key, value, attn_mask, dropout_p, enable_gqa, causal_alignment, window)
    left, right = window
    if is_causal:
        right = 0
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0

    refusal = unsupported_dtype(query)
    if query.shape[-1] > _MAX_HEAD_DIM or value.shape[-1] > _MAX_HEAD_DIM:
        refusal = f"a head dim above {_MAX_HEAD_DIM}"
    elif dropout_p > 0.0:
        refusal = "dropout_p > 0"
    elif attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        refusal = "an attn_mask that requires grad"
    chosen = registry.resolve("attention", backend, query.device, refusal)
    if chosen == "torch":
        return torch_eager(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window
        )

    q, k, v, lead = _heads(query, key, value, enable_gqa)
    length, keys = q.shape[2], k.shape[2]
    if attn_mask is not None:
        attn_mask = _four_dims(attn_mask, lead, length, keys)
    dropout_mask = None
    if dropout_p > 0.0:
        dropout_mask = F.dropout(torch.ones(*q.shape[:3], keys, dtype=_wide(q.dtype), device=q.device), dropout_p)
    bottom_right = causal_alignment == "bottom_right"
    out, _ = _op(q, k, v, attn_mask, dropout_mask, float(scale), left, right, bottom_right, chosen)
    return out if len(lead) == 2 else out.reshape(*lead, length, v.shape[-1])


def torch_eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_alignment: str,
    window: tuple[int, int],
) -> Tensor:
    """The same with torch.nn.functional, which needs an explicit mask for a window, for bottom-right, for two masks."""
    length, keys = query.shape[-2], key.shape[-2]
    bottom_right = causal_alignment == "bottom_right" and length != keys
    if tuple(window) != (-1, -1) or (is_causal and (bottom_right or attn_mask is not None)):
        left, right = window
        band = _band(length, keys, left, 0 if is_causal else right, bottom_right, query.device)
        assert band is not None
        if attn_mask is None:
            attn_mask = band
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & band
        else:
            attn_mask = attn_mask.masked_fill(~band, -math.inf)
        is_causal = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


# --- arguments ---


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    causal_alignment: str,
    window: tuple[int, int],
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
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"attention: dropout_p={dropout_p} must lie between 0 and 1")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"attention: causal_alignment={causal_alignment!r}; allowed are 'top_left' and 'bottom_right'")
    if len(window) != 2 or not all(isinstance(side, int) and side >= -1 for side in window):
        raise ValueError(f"attention: window={window!r} must be (left, right), two integers >= 0, or -1 for no limit")


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


def _band(length: int, keys: int, left: int, right: int, bottom_right: bool, device: torch.device) -> Tensor | None:
    """(L, S) boolean: which keys each query sees by the window and the causal rule; None if all."""
    if left < 0 and right < 0:
        return None
    shift = keys - length if bottom_right else 0
    distance = torch.arange(keys, device=device) - torch.arange(length, device=device)[:, None] - shift
    band = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        band &= distance >= -left
    if right >= 0:
        band &= distance <= right
    return band


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the reference computes, and of the log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """(B, H, L, D) over memory in (B, L, H, D) order, as torch's kernel gives: merging the heads is then a view."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _result(x: Tensor, like: Tensor) -> Tensor:
    return _empty(like, *x.shape).copy_(x)


# --- reference ---


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(B, H, S, D) with each head repeated for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> Tensor:
    """scale Q K^T + mask, -inf where a key is not seen."""
    scores = scale * (query @ key.transpose(-2, -1))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    band = _band(query.shape[-2], key.shape[-2], left, right, bottom_right, query.device)
    return scores if band is None else scores.masked_fill(~band, -math.inf)


def _softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, zero (with zero derivatives) where a query sees no key."""
    unseen = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(unseen, 0.0), -1).masked_fill(unseen, 0.0)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse): P = softmax(scores), out = P V, lse = log(sum(exp(scores))).

    A query that sees no key has lse = +inf, so that exp(scores - lse) is zero for it in a kernel's backward.
    ``dropout_mask`` holds 0 or 1 / (1 - p) and multiplies P.
    """
    dtype, heads = _wide(query.dtype), query.shape[1]
    q, k, v = query.to(dtype), _grouped(key.to(dtype), heads), _grouped(value.to(dtype), heads)
    scores = _scores(q, k, attn_mask, scale, left, right, bottom_right)
    lse = torch.logsumexp(scores, -1)
    lse = torch.where(lse == -math.inf, math.inf, lse)
    p = _softmax(scores)
    if dropout_mask is not None:
        p = p * dropout_mask
    return _result(p @ v, query), lse


def reference_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dQ, dK, dV, dmask). With P recomputed (from the scores alone, which keeps second derivatives right):

    dV = P^T dO,  dP = dO V^T,  delta = rowsum(dO * O),  dS = P * (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q,
    dmask = dS. Dropout multiplies P in dV and dP by its mask. Heads that share a key/value head add up.
    """
    dtype, heads = _wide(query.dtype), query.shape[1]
    q, k, v = query.to(dtype), _grouped(key.to(dtype), heads), _grouped(value.to(dtype), heads)
    do = dout.to(dtype)
    p = _softmax(_scores(q, k, attn_mask, scale, left, right, bottom_right))
    dp = do @ v.transpose(-2, -1)
    dv = (p if dropout_mask is None else p * dropout_mask).transpose(-2, -1) @ do
    if dropout_mask is not None:
        dp = dp * dropout_mask
    delta = (do * out.to(dtype)).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    dq = scale * (ds @ k)
    dk = scale * (ds.transpose(-2, -1) @ q)
    if key.shape[1] != heads:
        dk = dk.unflatten(1, (key.shape[1], -1)).sum(2)
        dv = dv.unflatten(1, (key.shape[1], -1)).sum(2)
    none = query.new_empty(0)
    dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype) if mask_grad and attn_mask is not None else none
    return _result(dq, query), _result(dk, query), _result(dv, query), dmask


# --- kernels ---


def _rows(x: Tensor) -> Tensor:
    """``x`` if its last dimension is contiguous, which is all that the kernel asks for; otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _common_fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> dict[str, Any]:
    """The fields that the forward and the backward kernel share."""
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    mask = None if attn_mask is None else attn_mask.expand(batch, heads, length, keys)
    additive = mask is not None and mask.dtype != torch.bool
    return {
        "q": pointer(query),
        "k": pointer(key),
        "v": pointer(value),
        "mask": pointer(mask),
        "sinks": None,
        "alibi": None,
        "dropout_seed": None,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "batch": batch,
        "heads": heads,
        "kv_heads": key.shape[1],
        "queries": length,
        "keys": keys,
        "dim": dim,
        "value_dim": value.shape[-1],
        "total_queries": batch * length,
        "total_keys": batch * keys,
        "q_strides": query.stride()[:3],
        "k_strides": key.stride()[:3],
        "v_strides": value.stride()[:3],
        "mask_strides": (0, 0, 0, 0) if mask is None else mask.stride(),
        "lse_strides": (heads * length, length),
        "alibi_stride": 0,
        "left": left,
        "right": right,
        "dropout_threshold": 0,
        "scale": scale,
        "softcap": 0.0,
        "bottom_right": bottom_right,
        "dtype": DTYPES[query.dtype],
        "mask_dtype": DTYPES[mask.dtype] if mask is not None and additive else 0,
        "mask_bool": mask is not None and not additive,
    }


def _native(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    assert dropout_mask is None  # refused by attention()
    query, key, value = _rows(query), _rows(key), _rows(value)
    batch, heads, length, _ = query.shape
    out = _empty(query, batch, heads, length, value.shape[-1])
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    if not out.numel() or not key.shape[2]:
        return out.zero_(), lse.fill_(math.inf)
    kernels.attention_forward(
        out=pointer(out),
        lse=pointer(lse),
        cache_seqlens=None,
        block_table=None,
        block_table_stride=0,
        page_size=0,
        num_splits=0,
        out_strides=out.stride()[:3],
        **_common_fields(query, key, value, attn_mask, scale, left, right, bottom_right),
    )
    return out, lse


def _native_backward(
    kernels: Kernels,
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert dropout_mask is None  # refused by attention()
    assert not mask_grad
    query, key, value, out, dout = (_rows(x) for x in (query, key, value, out, dout))
    dq, dk, dv = (_empty(query, *x.shape) for x in (query, key, value))
    none = query.new_empty(0)
    if not out.numel() or not key.shape[2]:
        return dq.zero_(), dk.zero_(), dv.zero_(), none
    kernels.attention_backward(
        dq=pointer(dq),
        dk=pointer(dk),
        dv=pointer(dv),
        dsinks=None,
        dout=pointer(dout),
        out=pointer(out),
        lse=pointer(lse),
        dq_strides=dq.stride()[:3],
        dk_strides=dk.stride()[:3],
        dv_strides=dv.stride()[:3],
        dout_strides=dout.stride()[:3],
        out_strides=out.stride()[:3],
        **_common_fields(query, key, value, attn_mask, scale, left, right, bottom_right),
    )
    return dq, dk, dv, none


# --- registration ---


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=_wide(query.dtype))
    return _empty(query, batch, heads, length, value.shape[-1]), lse


def _fake_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
    bottom_right: bool,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = attn_mask.new_empty(attn_mask.shape) if mask_grad and attn_mask is not None else query.new_empty(0)
    return _empty(query, *query.shape), _empty(query, *key.shape), _empty(query, *value.shape), dmask


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        dropout_mask: Tensor | None,
        scale: float,
        left: int,
        right: int,
        bottom_right: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        options = (scale, left, right, bottom_right)
        out, lse = registry.below_autograd(_op, query, key, value, attn_mask, dropout_mask, *options, backend)
        ctx.save_for_backward(query, key, value, attn_mask, dropout_mask, out, lse)
        ctx.options, ctx.backend = options, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mask_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dmask = _op_backward(dout, *ctx.saved_tensors, *ctx.options, mask_grad, ctx.backend)
        return dq, dk, dv, dmask if mask_grad else None, None, None, None, None, None, None


_op = registry.define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dropout_mask, float scale, int left,"
    " int right, bool bottom_right) -> (Tensor, Tensor)",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _Attention,
)
_op_backward = registry.define(
    "attention_backward",
    "(Tensor dout, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? dropout_mask, Tensor out,"
    " Tensor lse, float scale, int left, int right, bool bottom_right, bool mask_grad)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    {"reference": reference_backward, **native.backends(_native_backward)},
    _fake_backward,
)
registry.owner("attention", "cpu", "cpu", "online softmax, never an L x S matrix; deterministic gradients")
