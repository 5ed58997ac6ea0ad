"""What attention, attention_varlen and attention_with_kvcache share: their options, the checks, the kernels' fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.ops import checks
from fastgpt.ops.native import DTYPES, unsupported_dtype

MAX_HEAD_DIM = 256  # of the native kernels
DROPOUT_STEPS = 65536  # a weight is dropped by a 16-bit random number, so dropout_p counts in steps of 1 / 65536


class Options(NamedTuple):
    """The numbers of a call, in the order of the torch operators' schemas."""

    scale: float
    softcap: float
    dropout_threshold: int
    left: int
    right: int
    bottom_right: bool


SCHEMA = "float scale, float softcap, int dropout_threshold, int left, int right, bool bottom_right"


def options(
    op: str,
    query: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_alignment: str,
    window: tuple[int, int],
    softcap: float,
) -> Options:
    """The numbers of a call, checked."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p} must lie between 0 and 1")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"{op}: causal_alignment={causal_alignment!r}; allowed are 'top_left' and 'bottom_right'")
    if len(window) != 2 or not all(isinstance(side, int) and side >= -1 for side in window):
        raise ValueError(f"{op}: window={window!r} must be (left, right), two integers >= 0, or -1 for no limit")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap={softcap} must be a positive number, or 0 for none")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    left, right = window
    threshold = round(dropout_p * DROPOUT_STEPS)
    bottom_right = causal_alignment == "bottom_right"
    return Options(float(scale), float(softcap), threshold, left, 0 if is_causal else right, bottom_right)


def check_sinks(op: str, sinks: Tensor | None, query: Tensor, heads: int) -> Tensor | None:
    """``sinks`` checked and in the dtype that softmax computes in."""
    if sinks is None:
        return None
    checks.like(op, "sinks", sinks, "query", query, float32_too=True)
    checks.shape(op, "sinks", sinks, (heads,), "one logit per query head")
    return sinks.to(wide(query.dtype)).contiguous()


def check_alibi(op: str, slopes: Tensor | None, query: Tensor, lead: tuple[int, ...]) -> Tensor | None:
    """``alibi_slopes`` checked, as (B or 1, Hq); ``lead`` is (..., Hq)."""
    if slopes is None:
        return None
    checks.floating(op, "alibi_slopes", slopes)
    checks.same_device(op, "alibi_slopes", slopes, "query", query)
    if slopes.dtype != torch.float32:
        raise TypeError(f"{op}: alibi_slopes has dtype {slopes.dtype}; it must be torch.float32")
    heads = lead[-1:] or (1,)
    if tuple(slopes.shape) not in (heads, lead):
        either = f"{heads}" if len(lead) < 2 else f"{heads} or {lead}"
        raise ValueError(f"{op}: alibi_slopes has shape {tuple(slopes.shape)}; it must be {either} (..., heads)")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: alibi_slopes requires grad, but has no gradient here; give it detached")
    return slopes.reshape(-1, heads[0]).contiguous()


def check_seed(op: str, seed: Tensor | None, query: Tensor, threshold: int) -> Tensor | None:
    """``dropout_seed`` checked, or a seed from torch's generator; None without dropout."""
    if seed is not None:
        if not isinstance(seed, Tensor):
            raise TypeError(f"{op}: dropout_seed must be a Tensor or None, not {type(seed).__name__}")
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: dropout_seed has dtype {seed.dtype}; it must be torch.int64")
        if seed.numel() != 1:
            raise ValueError(f"{op}: dropout_seed has shape {tuple(seed.shape)}; it must hold one element")
        checks.same_device(op, "dropout_seed", seed, "query", query)
    if not threshold:
        return None
    if seed is None:
        # By an operator of torch's, so that a compiled or captured graph draws a new one each time it runs.
        return torch.randint(2**63 - 1, (1,), device=query.device)
    return seed.reshape(1)


def check_pairs(op: str, query: Tensor, names: tuple[str, str], key: Tensor, value: Tensor) -> None:
    """Head counts and head dims of (..., heads, head dim) tensors fit; ``names`` are those of key and value."""
    key_name, value_name = names
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{op}: {key_name} has shape {tuple(key.shape)}; its last dimension must be {query.shape[-1]}, as in query"
        )
    if value.shape[:-1] != key.shape[:-1]:
        expected = ", ".join(map(str, key.shape[:-1]))
        raise ValueError(
            f"{op}: {value_name} has shape {tuple(value.shape)}; it must be ({expected}, head dim), as {key_name} is"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {key_name} has {kv_heads} heads, which must divide query's {heads}")


def check_indices(op: str, name: str, tensor: Tensor, query: Tensor, dims: int) -> None:
    """``tensor`` holds int32 on query's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; it must be torch.int32")
    checks.same_device(op, name, tensor, "query", query)
    if tensor.dim() != dims:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}; it must have {dims} dimension{'s' * (dims > 1)}"
        )


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Why the native kernels do not take a call; for ``registry.resolve``."""
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] > MAX_HEAD_DIM:
        return f"a head dim above {MAX_HEAD_DIM}"
    return unsupported_dtype(query)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the reference computes, and of the log-sum-exp."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: Tensor) -> Tensor:
    """``x`` if its last dimension is contiguous, which is all that a kernel asks for; otherwise a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    seed: Tensor | None,
    o: Options,
) -> dict[str, Any]:
    """The fields that every kernel call has, of a dense (B, H, T, D) batch; other layouts replace what differs."""
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    return {
        "q": query,
        "k": key,
        "v": value,
        "mask": None,
        "sinks": sinks,
        "alibi": alibi,
        "dropout_seed": seed,
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
        "lse_strides": (heads * length, length),
        "mask_strides": (0, 0, 0, 0),
        "alibi_stride": 0 if alibi is None or alibi.shape[0] == 1 else heads,
        "left": o.left,
        "right": o.right,
        "dropout_threshold": o.dropout_threshold,
        "scale": o.scale,
        "softcap": o.softcap,
        "bottom_right": o.bottom_right,
        "dtype": DTYPES[query.dtype],
        "mask_dtype": 0,
        "mask_bool": False,
    }


def gradient_fields(
    strides: Callable[[Tensor], tuple[int, ...]], lse: Tensor, dsinks: Tensor | None, **tensors: Tensor
) -> dict[str, Any]:
    """The fields that only the backward has. ``tensors``: dq, dk, dv, dout and out, with their ``strides``."""
    return {
        "lse": lse,
        "dsinks": dsinks,
        **tensors,
        **{f"{name}_strides": strides(x) for name, x in tensors.items()},
    }


def slopes_of(alibi: Tensor | None, b: int) -> Tensor | None:
    """What sequence ``b`` alone has of check_alibi's (B or 1, Hq)."""
    return alibi if alibi is None or alibi.shape[0] == 1 else alibi[b : b + 1]


# The forward kernel's fields of a cache, where there is none.
NO_CACHE: dict[str, Any] = {
    "cache_seqlens": None,
    "block_table": None,
    "block_table_stride": 0,
    "page_size": 0,
    "num_splits": 0,
}
