"""Small calls of every operator on the emulator, forward and backward, that between them launch every CUDA kernel.

The checked build runs them (test_kernels_checked.py). Sizes are odd on purpose, rows are misaligned here and there, and
every option that makes a kernel take another path is there once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt import ops

Call = Callable[[], object]
CALLS: dict[str, Call] = {}  # "<op>: <what>"


def call(name: str) -> Callable[[Call], Call]:
    def add(function: Call) -> Call:
        CALLS[name] = function
        return function

    return add


def _randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(grad)


def _backward(*outputs: Tensor) -> None:
    wanted = [o for o in outputs if o.requires_grad]
    torch.autograd.backward(wanted, [torch.randn_like(o) for o in wanted])


def _shifted(t: Tensor) -> Tensor:
    """The same values in memory that starts one element off any alignment."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t.detach()).requires_grad_(t.requires_grad)


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _norms(dtype: torch.dtype, rows: int, width: int, shifted: bool, residual: bool) -> None:
    def layer_norm() -> None:
        x, weight, bias = _randn(rows, width, dtype=dtype), _randn(width, dtype=dtype), _randn(width, dtype=dtype)
        x = _shifted(x) if shifted else x
        extra = _randn(rows, width, dtype=dtype) if residual else None
        y = ops.layer_norm(x, (width,), weight, bias, residual=extra, backend="simt")
        _backward(*(y if isinstance(y, tuple) else (y,)))

    def rms_norm() -> None:
        x, weight = _randn(rows, width, dtype=dtype), _randn(width, dtype=dtype)
        x = _shifted(x) if shifted else x
        extra = _randn(rows, width, dtype=dtype) if residual else None
        y = ops.rms_norm(x, (width,), weight, residual=extra, backend="simt")
        _backward(*(y if isinstance(y, tuple) else (y,)))

    what = f"{NAMES[dtype]} {rows} x {width}{', misaligned' * shifted}{', residual' * residual}"
    call(f"layer_norm: {what}")(layer_norm)
    call(f"rms_norm: {what}")(rms_norm)


_norms(torch.float32, 3, 33, False, False)
_norms(torch.float32, 5, 1, False, True)
_norms(torch.bfloat16, 4, 256, False, True)
_norms(torch.bfloat16, 3, 1027, False, False)
_norms(torch.float16, 3, 1024, True, False)
_norms(torch.float32, 2, 4096, False, True)
_norms(torch.bfloat16, 1, 9000, False, False)
_norms(torch.float32, 70, 8, False, False)


def _activations(dtype: torch.dtype, rows: int, width: int, shifted: bool) -> None:
    def gelu(approximate: str, bias: bool) -> None:
        x = _randn(rows, width, dtype=dtype)
        x = _shifted(x) if shifted else x
        _backward(ops.gelu(x, approximate, bias=_randn(width, dtype=dtype) if bias else None, backend="simt"))

    def swiglu(packed: bool) -> None:
        if packed:
            _backward(ops.swiglu(_randn(rows, 2 * width, dtype=dtype), backend="simt"))
        else:
            gate, up = _randn(rows, width, dtype=dtype), _randn(rows, width, dtype=dtype)
            _backward(ops.swiglu(_shifted(gate) if shifted else gate, up, backend="simt"))

    what = f"{NAMES[dtype]} {rows} x {width}{', misaligned' * shifted}"
    call(f"gelu: {what}, tanh")(lambda: gelu("tanh", False))
    call(f"gelu: {what}, exact, bias")(lambda: gelu("none", True))
    call(f"swiglu: {what}")(lambda: swiglu(False))
    call(f"swiglu: {what}, packed")(lambda: swiglu(True))


_activations(torch.float32, 5, 123, False)
_activations(torch.bfloat16, 33, 256, False)
_activations(torch.float16, 3, 65, True)


def _rotary(dtype: torch.dtype, interleaved: bool, dim: int, rotated: int, offsets: int | Tensor) -> None:
    def run() -> None:
        cos, sin = ops.rotary_tables(40, rotated, dtype=dtype)
        x = _randn(2, 7, 3, dim, dtype=dtype).transpose(1, 2)
        _backward(ops.rotary(x, cos, sin, interleaved=interleaved, offsets=offsets, backend="simt"))

    kind = "interleaved" if interleaved else "halves"
    call(f"rotary: {NAMES[dtype]} {kind}, {rotated} of {dim}, {'offsets' if isinstance(offsets, Tensor) else offsets}")(
        run
    )


_rotary(torch.float32, False, 24, 24, 3)
_rotary(torch.bfloat16, False, 64, 64, torch.tensor([0, 5]))
_rotary(torch.bfloat16, True, 64, 64, 0)
_rotary(torch.float16, True, 30, 14, 1)
_rotary(torch.float16, False, 36, 6, torch.tensor([2, 1]))


@call("embedding: float32, positions")
def _() -> None:
    tokens = torch.randint(50, (3, 17))
    _backward(ops.embedding(tokens, _randn(50, 33), position_weight=_randn(20, 33), position_offset=2, backend="simt"))


@call("embedding: float16, misaligned, one token far more often than 128 times, an offset for each row")
def _() -> None:
    tokens = torch.where(torch.rand(4, 150) < 0.8, 7, torch.randint(300, (4, 150)))
    weight, position = _shifted(_randn(300, 16, dtype=torch.float16)), _randn(160, 16, dtype=torch.float16)
    offsets = torch.tensor([0, 3, 10, 7])
    _backward(ops.embedding(tokens, weight, position_weight=position, position_offset=offsets, backend="simt"))


@call("embedding: bfloat16, repeated tokens, padding, scaled")
def _() -> None:
    tokens = torch.randint(4, (2, 150), dtype=torch.int32)
    weight = _randn(11, 64, dtype=torch.bfloat16)
    _backward(ops.embedding(tokens, weight, padding_idx=1, scale_grad_by_freq=True, backend="simt"))


def _losses(dtype: torch.dtype, rows: int, classes: int, shifted: bool, **options: object) -> None:
    def run() -> None:
        x = _randn(rows, classes, dtype=dtype)
        x = _shifted(x) if shifted else x
        target = torch.randint(classes, (rows,))
        target[0] = -100
        _backward(ops.cross_entropy(x, target, backend="simt", **options))  # type: ignore[arg-type]

    called = ", ".join(f"{k}={v}" for k, v in options.items())
    call(f"cross_entropy: {NAMES[dtype]} {rows} x {classes}{', misaligned' * shifted} {called}")(run)


_losses(torch.float32, 5, 123, False, label_smoothing=0.1, z_loss=1e-3)
_losses(torch.bfloat16, 4, 2048, False)
_losses(torch.float16, 3, 1025, True, reduction="none")
_losses(torch.float32, 3, 1, False, reduction="sum")


@call("cross_entropy: bfloat16, rows of many classes, a target out of range")
def _() -> None:
    target = torch.tensor([3, 9000, 8999])
    _backward(ops.cross_entropy(_randn(3, 9000, dtype=torch.bfloat16), target, backend="simt"))


@call("linear_cross_entropy: bfloat16")
def _() -> None:
    x, weight = _randn(9, 32, dtype=torch.bfloat16), _randn(123, 32, dtype=torch.bfloat16)
    _backward(ops.linear_cross_entropy(x, weight, torch.randint(123, (9,)), backend="simt"))


@call("linear_cross_entropy: float32, bias, smoothing")
def _() -> None:
    loss = ops.linear_cross_entropy(
        _randn(7, 16),
        _randn(65, 16),
        torch.randint(65, (7,)),
        linear_bias=_randn(65),
        label_smoothing=0.1,
        backend="simt",
    )
    _backward(loss)


def _adamw(what: str, param: torch.dtype, grad: torch.dtype, sizes: list[int], master: bool, **options: object) -> None:
    def run() -> None:
        params = [_randn(n, dtype=param, grad=False) for n in sizes]
        grads = [_randn(n, dtype=grad, grad=False) for n in sizes]
        state = [torch.zeros(n) for n in sizes], [torch.zeros(n) for n in sizes]
        masters = [p.float() for p in params] if master else None
        ops.adamw(params, grads, *state, step=1, lr=0.1, master_params=masters, backend="simt", **options)  # type: ignore[arg-type]

    call(f"adamw: {what}")(run)


_adamw("float32, clipped", torch.float32, torch.float32, [5, 1024, 1, 333], False, max_norm=1.0)
_adamw("bfloat16 with masters", torch.bfloat16, torch.bfloat16, [70, 9], True)
_adamw("bfloat16 with float32 gradients", torch.bfloat16, torch.float32, [40, 8300], False, grad_scale=2.0)
_adamw("float16, a norm given", torch.float16, torch.float16, [41], True, max_norm=1.0, total_norm=torch.tensor(3.0))
_adamw("hundreds of tensors", torch.float32, torch.float32, [3] * 300, False, max_norm=0.5)


def _sample(what: str, vocab: int, dtype: torch.dtype, **options: object) -> None:
    call(f"sample: {what}")(
        lambda: ops.sample(_randn(3, vocab, dtype=dtype, grad=False), seed=3, backend="simt", **options)
    )  # type: ignore[arg-type]


_sample("greedy", 123, torch.float32, temperature=0.0)
_sample("plain", 1001, torch.bfloat16)
_sample("top-k", 515, torch.float32, top_k=7)
_sample("top-p", 700, torch.float16, top_p=0.9)
_sample("too many for shared memory", 9001, torch.bfloat16, top_k=8500, top_p=0.99)
_sample("options by row", 65, torch.float16, temperature=torch.tensor([0.0, 0.5, 2.0]), top_k=torch.tensor([0, 3, 99]))
_sample(
    "everything", 1025, torch.float32, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
    presence_penalty=0.1, frequency_penalty=0.1, previous_tokens=torch.tensor([[3, 5, 5], [1, 0, -1], [7, 7, 7]]),
    logit_bias=torch.randn(3, 1025),
)  # fmt: skip


def _attention(
    what: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int, int], grad: bool = True, **options: object
) -> None:
    batch, heads, kv_heads, queries, keys, dim = shape

    def run() -> None:
        q = _randn(batch, heads, queries, dim, dtype=dtype, grad=grad)
        k, v = (_randn(batch, kv_heads, keys, dim, dtype=dtype, grad=grad) for _ in range(2))
        chosen = {name: o() if callable(o) else o for name, o in options.items()}
        out = ops.attention(q, k, v, enable_gqa=True, backend="simt", **chosen)  # type: ignore[arg-type]
        if grad:
            _backward(out)

    call(f"attention: {what}, {NAMES[dtype]}")(run)


_attention("causal", torch.bfloat16, (1, 2, 1, 70, 70, 64), is_causal=True)
_attention("causal", torch.float32, (1, 2, 1, 37, 37, 24), is_causal=True)
_attention("cross", torch.float16, (1, 2, 2, 9, 131, 40))
_attention("window, softcap", torch.bfloat16, (1, 2, 2, 67, 67, 32), window=(20, 0), softcap=5.0)
_attention(
    "ALiBi, sinks", torch.float16, (1, 2, 1, 33, 65, 80), alibi_slopes=lambda: torch.rand(2), sinks=lambda: _randn(2)
)
_attention(
    "options",
    torch.float32,
    (1, 2, 1, 19, 35, 17),
    alibi_slopes=lambda: torch.rand(2),
    sinks=lambda: _randn(2),
    softcap=3.0,
)
_attention("mask", torch.bfloat16, (2, 2, 2, 33, 70, 128), attn_mask=lambda: torch.rand(2, 1, 33, 70) > 0.3)
_attention("dropout", torch.bfloat16, (1, 2, 1, 40, 40, 16), dropout_p=0.2, is_causal=True)
_attention("dropout", torch.float32, (1, 2, 1, 20, 20, 16), dropout_p=0.2)
_attention("wide heads", torch.bfloat16, (1, 1, 1, 40, 70, 256), is_causal=True)
_attention("decoding", torch.bfloat16, (2, 8, 2, 1, 150, 64), grad=False)
_attention("decoding", torch.float32, (2, 4, 2, 1, 150, 20), grad=False)


def _varlen(dtype: torch.dtype, dim: int) -> None:
    def run() -> None:
        cu_q = torch.tensor([0, 5, 5, 42, 43], dtype=torch.int32)
        cu_k = torch.tensor([0, 9, 12, 80, 80], dtype=torch.int32)
        q, k, v = (_randn(n, h, dim, dtype=dtype) for n, h in ((43, 2), (80, 1), (80, 1)))
        _backward(ops.attention_varlen(q, k, v, cu_q, cu_k, 37, 68, is_causal=True, backend="simt"))

    call(f"attention: varlen, {NAMES[dtype]}")(run)


_varlen(torch.bfloat16, 64)
_varlen(torch.float32, 12)


def _kvcache(dtype: torch.dtype, paged: bool, queries: int) -> None:
    def run() -> None:
        q = _randn(2, queries, 4, 32, dtype=dtype, grad=False)
        lengths = torch.tensor([70, 3], dtype=torch.int32)
        if paged:
            k, v = (_randn(7, 16, 2, 32, dtype=dtype, grad=False) for _ in range(2))
            table = torch.tensor([[4, 0, 2, 6, 1], [3, 5, 0, 0, 0]], dtype=torch.int32)
            ops.attention_with_kvcache(q, k, v, lengths, block_table=table, is_causal=True, backend="simt")
        else:
            k, v = (_randn(2, 80, 2, 32, dtype=dtype, grad=False) for _ in range(2))
            ops.attention_with_kvcache(q, k, v, lengths, is_causal=True, num_splits=3, backend="simt")

    call(f"attention: {'paged' if paged else 'contiguous'} cache, {queries} queries, {NAMES[dtype]}")(run)


_kvcache(torch.bfloat16, True, 1)
_kvcache(torch.bfloat16, False, 3)
_kvcache(torch.float32, True, 2)
_kvcache(torch.float32, False, 1)


# --- sizes at which a kernel should move what it needs and no more ---

ALIGNED: dict[str, Call] = {}  # for the budget of access quality (access.py)


def aligned(name: str) -> Callable[[Call], Call]:
    def add(function: Call) -> Call:
        ALIGNED[name] = function
        return function

    return add


@aligned("layer_norm")
def _() -> None:
    for width in (1024, 8192):
        x, weight, bias, residual = (
            _randn(*s, dtype=torch.bfloat16) for s in ((8, width), (width,), (width,), (8, width))
        )
        _backward(*ops.layer_norm(x, (width,), weight, bias, residual=residual, backend="simt"))


@aligned("rms_norm")
def _() -> None:
    for width in (1024, 8192):
        x, weight, residual = (_randn(*s, dtype=torch.bfloat16) for s in ((8, width), (width,), (8, width)))
        _backward(*ops.rms_norm(x, (width,), weight, residual=residual, backend="simt"))


@aligned("gelu")
def _() -> None:
    _backward(
        ops.gelu(_randn(32, 512, dtype=torch.bfloat16), "tanh", bias=_randn(512, dtype=torch.bfloat16), backend="simt")
    )


@aligned("swiglu")
def _() -> None:
    _backward(ops.swiglu(_randn(8, 512, dtype=torch.bfloat16), _randn(8, 512, dtype=torch.bfloat16), backend="simt"))


@aligned("rotary")
def _() -> None:
    cos, sin = ops.rotary_tables(16, 64, dtype=torch.bfloat16)
    _backward(ops.rotary(_randn(2, 4, 16, 64, dtype=torch.bfloat16), cos, sin, backend="simt"))


@aligned("embedding")
def _() -> None:
    tokens = torch.randint(64, (2, 64))
    weight, position = _randn(64, 256, dtype=torch.bfloat16), _randn(64, 256, dtype=torch.bfloat16)
    _backward(ops.embedding(tokens, weight, position_weight=position, backend="simt"))


@aligned("cross_entropy")
def _() -> None:
    _backward(ops.cross_entropy(_randn(4, 8192, dtype=torch.bfloat16), torch.randint(8192, (4,)), backend="simt"))


@aligned("adamw")
def _() -> None:
    params, grads = ([_randn(4096, dtype=torch.bfloat16, grad=False)] for _ in range(2))
    state = [torch.zeros(4096)], [torch.zeros(4096)]
    ops.adamw(params, grads, *state, step=1, lr=0.1, max_norm=1.0, master_params=[params[0].float()], backend="simt")


@aligned("sample")
def _() -> None:
    logits = _randn(2, 8192, dtype=torch.bfloat16, grad=False)
    ops.sample(logits, top_k=50, top_p=0.9, seed=1, backend="simt")


@aligned("attention")
def _() -> None:
    for dtype, length in ((torch.bfloat16, 256), (torch.float32, 128)):
        q, k, v = (_randn(1, 2, length, 64, dtype=dtype) for _ in range(3))
        _backward(ops.attention(q, k, v, is_causal=True, backend="simt"))
        with torch.no_grad():
            ops.attention(q[:, :, :1], k, v, backend="simt")
