"""The attention operators as one writes them in plain PyTorch: the peer that benchmarks and tests compare with.

``F.scaled_dot_product_attention`` where it can be had, otherwise the whole matrix of scores; masks are spelt out.
Nothing here is shared with the reference: packed sequences are one batch row with a block-diagonal mask, a cache is
read whole and masked.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.ops import philox
from fastgpt.ops.attention_options import DROPOUT_STEPS, Options


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    o: Options,
) -> Tensor:
    """attention by torch's function, which needs an explicit mask for a window, for bottom-right and for two masks."""
    length, keys = query.shape[-2], key.shape[-2]
    causal = o.left < 0 and o.right == 0 and attn_mask is None and not (o.bottom_right and length != keys)
    if not causal and (o.left >= 0 or o.right >= 0):
        band = _band(_distances(length, keys, query.device, keys - length if o.bottom_right else 0), o)
        if attn_mask is None:
            attn_mask = band
        elif attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & band
        else:
            attn_mask = attn_mask.masked_fill(~band, -math.inf)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, causal, scale=o.scale, enable_gqa=enable_gqa
    )


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    o: Options,
) -> Tensor:
    """(B, Hq, L, E), (B, H, S, E), (B, H, S, Ev) -> (B, Hq, L, Ev), with every option."""
    (batch, heads, length, _), keys, device = query.shape, key.shape[2], query.device
    visible = _band(_distances(length, keys, device, keys - length if o.bottom_right else 0), o)
    bias = None
    if alibi is not None:
        bias = -alibi[:, :, None, None] * _distances(length, keys, device, keys - length).abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        bias = attn_mask if bias is None else bias + attn_mask
    kept = None
    if seed is not None:
        head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
        i, j = torch.arange(length, device=device)[:, None], torch.arange(keys, device=device)
        kept = _dropout(seed, head, i, j, o.dropout_threshold)
    return _attend(query, key, value, visible, bias, sinks, kept, o)


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    o: Options,
) -> Tensor:
    """(total_q, Hq, E), (total_k, H, E), (total_k, H, Ev) -> (total_q, Hq, Ev)."""
    batch, heads = cu_seqlens_q.shape[0] - 1, query.shape[1]
    # Of every token: its sequence (`batch` if none), its index there, and the sequence's lengths.
    q_row, q_at, q_lengths = _sequences(cu_seqlens_q, query.shape[0])
    k_row, k_at, k_lengths = _sequences(cu_seqlens_k, key.shape[0])
    shift = F.pad(k_lengths - q_lengths, (0, 1))[q_row][:, None]
    distance = k_at - q_at[:, None]
    same = (q_row[:, None] == k_row) & (k_row < batch)
    visible = same & _band(distance - shift if o.bottom_right else distance, o)
    bias = kept = None
    if alibi is not None:
        slopes = F.pad(alibi.expand(batch, heads), (0, 0, 0, 1))[q_row]
        bias = (-slopes.t()[:, :, None] * (distance - shift).abs())[None]
    if seed is not None:
        head = q_row[:, None] * heads + torch.arange(heads, device=query.device)[:, None, None]
        kept = _dropout(seed, head, q_at[:, None], k_at, o.dropout_threshold)[None]
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _attend(q, k, v, visible, bias, sinks, kept, o)[0].transpose(0, 1)


def cached(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    sinks: Tensor | None,
    alibi: Tensor | None,
    o: Options,
) -> Tensor:
    """(B, T, Hq, E), caches (B, S, H, E or Ev) or pages of them -> (B, T, Hq, Ev)."""
    key, value = k_cache, v_cache
    if block_table is not None:
        pages = block_table.clamp(0, k_cache.shape[0] - 1)  # entries past the last key may be anything
        key, value = (cache[pages].flatten(1, 2) for cache in (k_cache, v_cache))
    length, keys, device = query.shape[1], key.shape[1], query.device
    seen = torch.arange(keys, device=device) < cache_seqlens[:, None]
    key, value = (x.masked_fill(~seen[..., None, None], 0.0).transpose(1, 2) for x in (key, value))
    shift = (cache_seqlens - length)[:, None, None, None]
    distance = _distances(length, keys, device, 0)
    visible = seen[:, None, None] & _band(distance - shift if o.bottom_right else distance, o)
    bias = None if alibi is None else -alibi[:, :, None, None] * (distance - shift).abs()
    return _attend(query.transpose(1, 2), key, value, visible, bias, sinks, None, o).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    o: Options,
) -> Tensor:
    """(B, H, L, E) tensors, and what broadcasts to (B, Hq, L, S): the keys that are seen, what is added to the scores,
    the weights that are kept."""
    # Torch's fused kernel has no cap, no dropout of our choice, and no gradient of its mask.
    if o.softcap or kept is not None or (sinks is not None and sinks.requires_grad):
        return _whole_matrix(query, key, value, visible, bias, sinks, kept, o)
    batch, heads, length, dim = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    mask = torch.zeros(batch, heads, length, key.shape[2], dtype=dtype, device=query.device)
    mask = (mask if bias is None else mask + bias).masked_fill(~visible, -math.inf)
    if sinks is not None:  # a key of zeros, whose score is then the mask's, with a value of zeros
        mask = torch.cat([mask, sinks[:, None, None].expand(batch, heads, length, 1)], -1)
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    value_dim = value.shape[-1]
    if value_dim != dim:  # which torch's fused kernel does not take
        query, key, value = (F.pad(x, (0, max(dim, value_dim) - x.shape[-1])) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=o.scale, enable_gqa=True)
    return out[..., :value_dim]


def _whole_matrix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    kept: Tensor | None,
    o: Options,
) -> Tensor:
    """Products in the tensors' dtype, the softmax in float32 (or float64): Hugging Face's eager attention."""
    batch, heads, length, _ = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)).to(torch.promote_types(query.dtype, torch.float32)) * o.scale
    if o.softcap:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(batch, heads, length, 1)], -1)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    p = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    p = p[..., : key.shape[2]]
    if kept is not None:
        p = p * kept * (DROPOUT_STEPS / max(DROPOUT_STEPS - o.dropout_threshold, 1))
    return p.to(query.dtype) @ value


def _distances(length: int, keys: int, device: torch.device, shift: int) -> Tensor:
    """j - (i + shift), (L, S)."""
    return torch.arange(keys, device=device) - torch.arange(length, device=device)[:, None] - shift


def _band(distance: Tensor, o: Options) -> Tensor:
    """Where the window and the causal rule let a query see a key."""
    visible = torch.ones_like(distance, dtype=torch.bool)
    if o.left >= 0:
        visible = visible & (distance >= -o.left)
    if o.right >= 0:
        visible = visible & (distance <= o.right)
    return visible


def _sequences(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `total` tokens: the sequence of each, the index in it; and the lengths."""
    token = torch.arange(total, device=cu_seqlens.device)
    row = torch.bucketize(token, cu_seqlens[1:].long(), right=True)
    start = F.pad(cu_seqlens[:-1].long(), (0, 1))[row]
    return row, token - start, cu_seqlens.long().diff()


def _dropout(seed: Tensor, head: Tensor, i: Tensor, j: Tensor, threshold: int) -> Tensor:
    """Which weights are kept. One call of Philox a weight, of which one of eight numbers is used."""
    head, i, j = torch.broadcast_tensors(head, i, j)
    stream = torch.full_like(head, philox.ATTENTION_STREAM)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = torch.stack(philox.philox4x32((j // 8, i, head, stream), key), -1)
    word = words.gather(-1, (j % 8 // 2)[..., None])[..., 0]
    number = torch.where(j % 2 == 1, word >> 16, word & 0xFFFF)
    return number >= threshold
