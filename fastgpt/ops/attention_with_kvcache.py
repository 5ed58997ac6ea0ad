"""attention_with_kvcache: attention of new tokens over a cache of keys and values, in one piece or in pages.

Shapes: B sequences, T new tokens of each, Hq query heads, H key/value heads, E head dim of query and key, Ev of value.
Pages: vLLM's PagedAttention (Kwon et al., 2023), with FlashAttention's arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import attention_eager, checks, native, registry
from fastgpt.ops.attention import reference
from fastgpt.ops.attention_options import (
    SCHEMA,
    Options,
    check_alibi,
    check_indices,
    check_pairs,
    check_sinks,
    fields,
    options,
    refusal,
    rows,
    slopes_of,
)
from fastgpt.ops.native import Kernels

_NAME = "attention_with_kvcache"


def attention_with_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Attention of T queries a sequence over its first cache_seqlens keys, as ``flash_attn_with_kvcache``.

    The cache already holds the new tokens' keys and values (with their positions turned in: ``rotary``). There is no
    gradient.

    Args:
        query: (B, T, Hq, E); float32, bfloat16, float16 (float64 on the reference). Any strides.
        k_cache: (B, S, H, E), of query's dtype; or (pages, page_size, H, E) with ``block_table``. Hq is a multiple of
            H: consecutive query heads share a key/value head.
        v_cache: the same with Ev.
        cache_seqlens: (B,) int32: how many keys of the cache sequence b has, its new tokens included.
        block_table: (B, max_pages) int32: key j of sequence b lies in row j % page_size of page
            block_table[b, j // page_size]. Entries past its last key may hold anything.
        is_causal: query i of sequence b sees the keys up to i + cache_seqlens[b] - T: the last one sees all.
        alibi_slopes: (Hq,) or (B, Hq).
        scale, window, softcap, sinks: see ``attention``; by each sequence's own length.
        num_splits: into how many pieces a kernel may split the keys, to fill a GPU with few sequences; 0: it chooses.
            The last digits of the result depend on it.
        backend: see ``fastgpt.ops``.

    Returns:
        (B, T, Hq, Ev) of query's dtype. A query that sees no key gives zeros.

    Raises:
        TypeError: a dtype that is not allowed. ValueError: shapes or options that do not fit. Each names the argument.
        On the CPU also values of cache_seqlens or block_table that point out of the cache; on a GPU they are not looked
        at, which would make it wait.
        NotImplementedError: an argument requires grad.
    """
    _check(query, k_cache, v_cache, cache_seqlens, block_table, num_splits)
    batch, _, heads, _ = query.shape
    o = options(_NAME, query, 0.0, is_causal, scale, "bottom_right", window, softcap)
    sinks = check_sinks(_NAME, sinks, query, heads)
    alibi = check_alibi(_NAME, alibi_slopes, query, (batch, heads))
    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache), ("sinks", sinks)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{_NAME}: {name} requires grad, but there is no gradient; use torch.no_grad()")
    chosen = registry.resolve(_NAME, backend, query.device, refusal(query, v_cache))
    cache_seqlens = cache_seqlens.contiguous()
    block_table = None if block_table is None else block_table.contiguous()
    tensors = (query, k_cache, v_cache, cache_seqlens, block_table, sinks, alibi)
    return attention_eager.cached(*tensors, o) if chosen == "torch" else _op(*tensors, *o, num_splits, chosen)


def _check(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    num_splits: int,
) -> None:
    checks.floating(_NAME, "query", query)
    checks.like(_NAME, "k_cache", k_cache, "query", query)
    checks.like(_NAME, "v_cache", v_cache, "query", query)
    layout = "(B, S, heads, head dim)" if block_table is None else "(pages, page_size, heads, head dim)"
    needed = {"query": "(B, T, heads, head dim)", "k_cache": layout, "v_cache": layout}
    for (name, form), tensor in zip(needed.items(), (query, k_cache, v_cache), strict=True):
        if tensor.dim() != 4:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(tensor.shape)}; it must be {form}")
    check_pairs(_NAME, query, ("k_cache", "v_cache"), k_cache, v_cache)
    batch = query.shape[0]
    check_indices(_NAME, "cache_seqlens", cache_seqlens, query, 1)
    checks.shape(_NAME, "cache_seqlens", cache_seqlens, (batch,), "one length per sequence of query")
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise ValueError(f"{_NAME}: k_cache has {k_cache.shape[0]} sequences; it must have query's {batch}")
    else:
        check_indices(_NAME, "block_table", block_table, query, 2)
        if block_table.shape[0] != batch:
            raise ValueError(f"{_NAME}: block_table has {block_table.shape[0]} rows; it must have query's {batch}")
    if not isinstance(num_splits, int) or num_splits < 0:
        raise ValueError(f"{_NAME}: num_splits={num_splits!r} must be an integer >= 0")


def _lengths(k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> list[int]:
    """``cache_seqlens``, checked with what of the block table they use. Waits for the device."""
    lengths = cache_seqlens.tolist()
    pages, page_size = k_cache.shape[:2]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    for b, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"{_NAME}: cache_seqlens[{b}]={length} must lie between 0 and the cache's {capacity}")
        if block_table is not None:
            for n, page in enumerate(block_table[b, : -(-length // page_size) if length else 0].tolist()):
                if not 0 <= page < pages:
                    raise ValueError(f"{_NAME}: block_table[{b}, {n}]={page} must lie between 0 and {pages - 1}")
    return lengths


# --- reference: one sequence after the other ---


def _reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    *numbers: Any,
) -> Tensor:
    *settings, _ = numbers
    out = query.new_empty(*query.shape[:3], v_cache.shape[-1])
    for b, length in enumerate(_lengths(k_cache, cache_seqlens, block_table)):
        if block_table is None:
            key, value = k_cache[b, :length], v_cache[b, :length]
        else:
            pages = block_table[b, : -(-length // k_cache.shape[1]) if length else 0]
            key, value = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        q, k, v = (x.transpose(0, 1)[None] for x in (query[b], key, value))
        out[b] = reference(q, k, v, None, sinks, slopes_of(alibi, b), None, *settings)[0][0].transpose(0, 1)
    return out


# --- kernels ---


def _native(
    kernels: Kernels,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    *numbers: Any,
) -> Tensor:
    *settings, num_splits = numbers
    query, k_cache, v_cache = rows(query), rows(k_cache), rows(v_cache)
    if query.device.type == "cpu":
        _lengths(k_cache, cache_seqlens, block_table)
    batch, length, heads, _ = query.shape
    page_size = 0 if block_table is None else k_cache.shape[1]
    keys = k_cache.shape[1] if block_table is None else block_table.shape[1] * page_size
    out = query.new_empty(batch, length, heads, v_cache.shape[-1])
    if not out.numel() or not keys:
        return out.zero_()
    lse = query.new_empty(batch, heads, length, dtype=torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (query, k_cache, v_cache))
    kernels.attention_forward(
        **{
            **fields(q, k, v, sinks, alibi, None, Options(*settings)),
            "out": out,
            "lse": lse,
            "out_strides": out.transpose(1, 2).stride()[:3],
            "cache_seqlens": cache_seqlens,
            "block_table": block_table,
            "block_table_stride": 0 if block_table is None else block_table.shape[1],
            "page_size": page_size,
            "keys": keys,
            "total_keys": 0,
            "num_splits": num_splits,
        }
    )
    return out


# --- registration ---


def _fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(*query.shape[:3], v_cache.shape[-1])


_op = registry.define(
    _NAME,
    "(Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, Tensor? sinks,"
    f" Tensor? alibi, {SCHEMA}, int num_splits) -> Tensor",
    {"reference": _reference, **native.backends(_native)},
    _fake,
)
