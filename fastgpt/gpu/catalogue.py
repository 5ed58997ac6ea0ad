"""Representative calls of every operator, so that each of its Triton kernels is compiled with what production has.

A kernel's code depends on dtypes, on options, on whether sizes and strides are multiples of 16, and on the sizes that
choose a configuration. The calls here have the shapes of GPT-2 and Llama models in all but the number of rows, and each
option that makes other code at least once. They are made on CPU tensors while launches are recorded: nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAMES = {F32: "f32", BF16: "bf16", F16: "f16"}
BACKEND = "triton"


class Case(NamedTuple):
    """``label`` tells cases of an operator apart; ``call`` runs it, backward included."""

    op: str
    label: str
    call: Callable[[], Any]


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _differentiated(function: Callable[..., Any], *inputs: Any, **options: Any) -> None:
    """The operator, and its gradient for every input that wants one; the values do not matter."""
    result = function(*inputs, backend=BACKEND, **options)
    results = (result,) if isinstance(result, Tensor) else result
    leaves = [t for t in (*inputs, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(results, leaves, [torch.empty_like(r) for r in results])


def cases() -> Iterator[Case]:
    """Every case, those that take longest to compile first."""
    for op in (_attention, _attention_varlen, _attention_with_kvcache, _norms, _activations, _losses, _rest):
        yield from op()


def _heads(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """(B, H, T, D) as a model has it: a view of the (B, T, H, D) projection."""
    return torch.empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_()


def _attention() -> Iterator[Case]:
    def call(dtype: torch.dtype, dim: int, heads: int = 4, kv: int = 4, **options: Any) -> Callable[[], None]:
        def run() -> None:
            q, k, v = (_heads(1, h, 1024, dim, dtype) for h in (heads, kv, kv))
            extras = {name: value() if callable(value) else value for name, value in options.items()}
            _differentiated(ops.attention, q, k, v, enable_gqa=heads != kv, **extras)

        return run

    everything: dict[str, Any] = {
        "is_causal": True,
        "window": (256, 0),
        "softcap": 30.0,
        "dropout_p": 0.1,
        "alibi_slopes": lambda: torch.empty(4),
        "sinks": lambda: torch.empty(4, requires_grad=True),
    }
    yield Case("attention", "bf16 D=64 causal", call(BF16, 64, is_causal=True))
    yield Case("attention", "bf16 D=128 causal GQA", call(BF16, 128, kv=1, is_causal=True))
    yield Case("attention", "bf16 D=256 causal", call(BF16, 256, is_causal=True))
    yield Case("attention", "bf16 D=64 all options", call(BF16, 64, **everything))
    yield Case("attention", "f16 D=128 causal", call(F16, 128, is_causal=True))
    yield Case("attention", "f32 D=64 causal", call(F32, 64, is_causal=True))


def _attention_varlen() -> Iterator[Case]:
    def call(dtype: torch.dtype, dim: int) -> Callable[[], None]:
        def run() -> None:
            q, k, v = (_leaf(1024, 4, dim, dtype=dtype) for _ in range(3))
            starts = torch.tensor([0, 512, 1024], dtype=torch.int32)
            _differentiated(ops.attention_varlen, q, k, v, starts, starts, 512, 512, is_causal=True)

        return run

    for dtype, dim in ((BF16, 64), (BF16, 128)):
        yield Case("attention_varlen", f"{NAMES[dtype]} D={dim} causal", call(dtype, dim))


def _attention_with_kvcache() -> Iterator[Case]:
    def call(dtype: torch.dtype, dim: int, length: int = 1, paged: bool = False) -> Callable[[], None]:
        def run() -> None:
            query = torch.empty(2, length, 8, dim, dtype=dtype)
            pages = (8, 256) if paged else (2, 1024)
            k_cache, v_cache = (torch.empty(*pages, 2, dim, dtype=dtype) for _ in range(2))
            table = torch.arange(8, dtype=torch.int32).view(2, 4) if paged else None
            lengths = torch.tensor([1000, 600], dtype=torch.int32)
            ops.attention_with_kvcache(query, k_cache, v_cache, lengths, table, is_causal=True, backend=BACKEND)

        return run

    for dtype, dim, length, paged in (
        (BF16, 128, 1, False),
        (BF16, 128, 1, True),
        (BF16, 64, 16, False),
        (F32, 64, 1, False),
    ):
        label = f"{NAMES[dtype]} D={dim}{f' L={length}' if length > 1 else ''}{' paged' if paged else ''}"
        yield Case("attention_with_kvcache", label, call(dtype, dim, length, paged))


def _norms() -> Iterator[Case]:
    def layer_norm(dtype: torch.dtype, cols: int, affine: torch.dtype | None, residual: bool) -> Callable[[], None]:
        def run() -> None:
            x = _leaf(64, cols, dtype=dtype)
            weight, bias = (None if affine is None else _leaf(cols, dtype=affine) for _ in range(2))
            extra = {"residual": _leaf(64, cols, dtype=dtype)} if residual else {}
            _differentiated(ops.layer_norm, x, (cols,), weight, bias, **extra)

        return run

    def rms_norm(dtype: torch.dtype, cols: int, affine: torch.dtype | None, residual: bool) -> Callable[[], None]:
        def run() -> None:
            weight = None if affine is None else _leaf(cols, dtype=affine)
            extra = {"residual": _leaf(64, cols, dtype=dtype)} if residual else {}
            _differentiated(ops.rms_norm, _leaf(64, cols, dtype=dtype), (cols,), weight, 1e-5, **extra)

        return run

    kinds: tuple[tuple[torch.dtype, int, torch.dtype | None, bool], ...] = (
        (BF16, 768, BF16, True),
        (BF16, 768, BF16, False),
        (BF16, 4096, BF16, True),
        (BF16, 768, F32, True),
        (F16, 768, F16, True),
        (F32, 768, F32, True),
        (F32, 768, None, False),
        (BF16, 128, BF16, False),  # the norm of a head's queries and keys
        (BF16, 16384, BF16, True),
    )
    for name, make in (("layer_norm", layer_norm), ("rms_norm", rms_norm)):
        for dtype, cols, affine, residual in kinds:
            with_affine = "no weight" if affine is None else f"weight {NAMES[affine]}"
            label = f"{NAMES[dtype]} {cols} {with_affine}{' residual' if residual else ''}"
            yield Case(name, label, make(dtype, cols, affine, residual))


def _activations() -> Iterator[Case]:
    def gelu(dtype: torch.dtype, approximate: str, bias: torch.dtype | None) -> Callable[[], None]:
        def run() -> None:
            extra = {} if bias is None else {"bias": _leaf(3072, dtype=bias)}
            _differentiated(ops.gelu, _leaf(64, 3072, dtype=dtype), approximate, **extra)

        return run

    def swiglu(dtype: torch.dtype, packed: bool) -> Callable[[], None]:
        def run() -> None:
            if packed:
                _differentiated(ops.swiglu, _leaf(64, 2 * 5632, dtype=dtype))
            else:
                _differentiated(ops.swiglu, *(_leaf(64, 5632, dtype=dtype) for _ in range(2)))

        return run

    for dtype, bias in ((BF16, BF16), (BF16, F32), (F16, F16), (F32, F32), (BF16, None), (F32, None)):
        for approximate in ("none", "tanh"):
            with_bias = "" if bias is None else f" bias {NAMES[bias]}"
            yield Case("gelu", f"{NAMES[dtype]} {approximate}{with_bias}", gelu(dtype, approximate, bias))
    for dtype in (BF16, F16, F32):
        for packed in (False, True):
            yield Case("swiglu", f"{NAMES[dtype]}{' packed' if packed else ''}", swiglu(dtype, packed))


def _losses() -> Iterator[Case]:
    def cross_entropy(dtype: torch.dtype, vocabulary: int, extras: bool) -> Callable[[], None]:
        def run() -> None:
            options = {"label_smoothing": 0.1, "z_loss": 1e-4} if extras else {}
            target = torch.zeros(32, dtype=torch.int64)
            _differentiated(ops.cross_entropy, _leaf(32, vocabulary, dtype=dtype), target, **options)

        return run

    def linear_cross_entropy(dtype: torch.dtype) -> Callable[[], None]:
        def run() -> None:
            target = torch.zeros(32, dtype=torch.int64)
            _differentiated(ops.linear_cross_entropy, *(_leaf(n, 64, dtype=dtype) for n in (32, 8192)), target)

        return run

    for dtype, vocabulary, extras in (
        (BF16, 50304, False),
        (BF16, 50257, False),  # GPT-2's: rows are not aligned
        (BF16, 50304, True),
        (F16, 50304, False),
        (F32, 50304, False),
        (F32, 50257, True),
    ):
        label = f"{NAMES[dtype]} V={vocabulary}{' smoothing z_loss' if extras else ''}"
        yield Case("cross_entropy", label, cross_entropy(dtype, vocabulary, extras))
    for dtype in (BF16, F32):
        yield Case("linear_cross_entropy", NAMES[dtype], linear_cross_entropy(dtype))


def _rest() -> Iterator[Case]:
    def rotary(dtype: torch.dtype, dim: int, interleaved: bool, offsets: bool) -> Callable[[], None]:
        def run() -> None:
            x = _heads(2, 4, 64, dim, dtype)
            cos, sin = ops.rotary_tables(1024, dim)
            where = torch.zeros(2, dtype=torch.int64) if offsets else 0
            _differentiated(ops.rotary, x, cos, sin, interleaved=interleaved, offsets=where)

        return run

    for dtype, dim, interleaved, offsets in (
        (BF16, 64, False, False),
        (BF16, 128, False, True),
        (BF16, 64, True, False),
        (F16, 64, False, False),
        (F32, 64, False, False),
        (F32, 128, True, True),
    ):
        label = f"{NAMES[dtype]} D={dim}{' interleaved' if interleaved else ''}{' offsets' if offsets else ''}"
        yield Case("rotary", label, rotary(dtype, dim, interleaved, offsets))

    def embedding(dtype: torch.dtype, cols: int, positions: bool) -> Callable[[], None]:
        def run() -> None:
            extra = {"position_weight": _leaf(1024, cols, dtype=dtype)} if positions else {}
            tokens = torch.arange(128).view(2, 64)
            _differentiated(ops.embedding, tokens, _leaf(1024, cols, dtype=dtype), **extra)

        return run

    for dtype, cols, positions in ((BF16, 768, True), (BF16, 4096, False), (F16, 768, True), (F32, 768, True)):
        label = f"{NAMES[dtype]} C={cols}{' positions' if positions else ''}"
        yield Case("embedding", label, embedding(dtype, cols, positions))

    def adamw(dtype: torch.dtype, masters: bool, clipped: bool) -> Callable[[], None]:
        def run() -> None:
            params, grads = ([torch.empty(768, 768, dtype=dtype)] for _ in range(2))
            averages = [[torch.empty(768, 768)] for _ in range(2)]
            extra: dict[str, Any] = {"master_params": [torch.empty(768, 768)]} if masters else {}
            if clipped:
                extra["max_norm"] = 1.0
            ops.adamw(params, grads, *averages, step=1, lr=1e-3, backend=BACKEND, **extra)

        return run

    for dtype, masters, clipped in ((BF16, True, True), (F16, True, True), (BF16, False, True), (F32, False, False)):
        label = f"{NAMES[dtype]}{' masters' if masters else ''}{' clipped' if clipped else ''}"
        yield Case("adamw", label, adamw(dtype, masters, clipped))

    def sample(dtype: torch.dtype, vocabulary: int, **options: Any) -> Callable[[], None]:
        def run() -> None:
            extras = {name: value() if callable(value) else value for name, value in options.items()}
            ops.sample(torch.zeros(2, vocabulary, dtype=dtype), backend=BACKEND, seed=1, **extras)

        return run

    penalties = {
        "repetition_penalty": 1.1,
        "previous_tokens": lambda: torch.zeros(2, 64, dtype=torch.int64),
        "logit_bias": lambda: torch.zeros(50257),
    }
    nucleus = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    yield Case("sample", "bf16 V=50257 top_k top_p", sample(BF16, 50257, **nucleus))
    yield Case("sample", "bf16 V=128256 top_k top_p", sample(BF16, 128256, **nucleus))
    yield Case("sample", "f16 V=50257 top_k top_p", sample(F16, 50257, **nucleus))
    yield Case("sample", "f32 V=50257 top_k top_p", sample(F32, 50257, **nucleus))
    yield Case("sample", "f32 V=50257 all options", sample(F32, 50257, **nucleus, **penalties))
    yield Case("sample", "bf16 V=50257 greedy", sample(BF16, 50257, temperature=0.0))
