"""rotary: rotary position embedding (RoPE; Su et al., 2021, "RoFormer", arXiv 2104.09864).

The pair (x1, x2) of a head at position p is turned by the angle theta of that pair and position:

    y1 = x1 cos(theta) - x2 sin(theta),   y2 = x2 cos(theta) + x1 sin(theta)

Shapes: B batch, H heads, T tokens, D head dim, R <= D rotated dims (R/2 pairs), max_len rows of the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import checks, memory, native, positions, registry
from fastgpt.ops.native import DTYPES, Kernels, unsupported_dtype
from fastgpt.ops.numerics import accumulate


def rotary(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offsets: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """Turns the first R dims of each head by its token's position; the other D - R dims pass through.

    Args:
        input: (..., H, T, D) or (T, D), float32, bfloat16, float16 (float64 on the reference). A transposed view of
            (B, T, H, D) is read in place.
        cos, sin: (max_len, R / 2), of input's dtype or float32, as from ``rotary_tables``. They get no gradient.
        interleaved: False pairs dim i with i + R/2 (GPT-NeoX, Llama in Hugging Face), True 2i with 2i+1 (GPT-J, GGUF).
        offsets: position of the first token: an int, or an int64 tensor (B,), one for each of input's first dimension.
        backend: see ``fastgpt.ops``.

    Returns:
        A contiguous tensor of input's shape and dtype. (The gradient comes back in the memory order of ``input``.)

    Raises:
        IndexError: a position outside the tables. On a GPU the caller would have to wait for the kernel to learn of one
            from a tensor of offsets: there those rows of the result are NaN. (An int is checked everywhere.)
        TypeError, ValueError: a dtype, device or shape that does not fit, or tables that require grad.
    """
    checks.floating("rotary", "input", input)
    if input.dim() < 2:
        raise ValueError(f"rotary: input has shape {tuple(input.shape)}; it must be (..., T, D)")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.like("rotary", name, table, "input", input, float32_too=True)
        if table.requires_grad:
            raise ValueError(f"rotary: {name} requires grad, but the tables get no gradient; pass {name}.detach()")
    if cos.dim() != 2 or 2 * cos.shape[1] > input.shape[-1]:
        raise ValueError(
            f"rotary: cos has shape {tuple(cos.shape)}; it must be (max_len, R / 2) with R at most {input.shape[-1]}, "
            "input's last dimension"
        )
    checks.like("rotary", "sin", sin, "cos", cos)
    checks.shape("rotary", "sin", sin, cos.shape, "cos's shape")
    if isinstance(offsets, Tensor) and input.dim() < 3:
        raise ValueError(
            f"rotary: offsets as a tensor needs a batch dimension, but input has shape {tuple(input.shape)}"
        )
    starts, start = positions.split("rotary", "offsets", offsets, input, "input", input.shape[-2], cos.shape[0], "cos")

    chosen = registry.resolve("rotary", backend, input.device, unsupported_dtype(input))
    if chosen == "torch":
        return torch_eager(input, cos, sin, starts, start, interleaved)
    return _op(input, cos, sin, starts, start, interleaved, False, False, chosen)


def rotary_tables(
    max_len: int,
    dim: int,
    theta: float = 10000.0,
    *,
    scaling: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tables (cos, sin), each (max_len, dim / 2), of the angles p * theta^(-2i / dim); computed in float64.

    Args:
        max_len: number of positions.
        dim: R, the number of rotated dims: even.
        theta: the base.
        scaling: Llama 3's change of frequencies for contexts longer than those of pretraining, with the keys
            ``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings`` (L): wavelengths
            above L / low_freq_factor are multiplied by ``factor``, those below L / high_freq_factor stay, and between
            them the frequency is interpolated linearly in L / wavelength.
        dtype, device: of the tables. float32 tables serve every input dtype.
    """
    if max_len < 0 or dim < 0 or dim % 2:
        raise ValueError(f"rotary_tables: max_len={max_len}, dim={dim}; max_len must be >= 0 and dim even and >= 0")
    if not (theta > 0 and math.isfinite(theta)):
        raise ValueError(f"rotary_tables: theta={theta}; it must be positive and finite")
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1))
    if scaling is not None:
        frequency = _scale_frequencies(frequency, scaling)
    angle = torch.arange(max_len, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _scale_frequencies(frequency: Tensor, scaling: Mapping[str, float]) -> Tensor:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if set(scaling) != set(keys):
        raise ValueError(f"rotary_tables: scaling has the keys {sorted(scaling)}; it must have exactly {sorted(keys)}")
    factor, low, high, length = (float(scaling[key]) for key in keys)
    if not (factor > 0 and 0 < low < high and length > 0):
        raise ValueError(
            f"rotary_tables: scaling={dict(scaling)}; it must have factor > 0, 0 < low_freq_factor < high_freq_factor "
            "and original_max_position_embeddings > 0"
        )
    turns = length * frequency / (2 * math.pi)  # full turns within the original context: L / wavelength
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def torch_eager(
    input: Tensor, cos: Tensor, sin: Tensor, starts: Tensor | None, start: int, interleaved: bool
) -> Tensor:
    """The same as it is usually written in PyTorch: x * cos + rotate_half(x) * sin."""
    cos, sin = _rows(cos, input, starts, start), _rows(sin, input, starts, start)
    dims = 2 * cos.shape[-1]
    x = input[..., :dims]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        turned = torch.cat((-x[..., dims // 2 :], x[..., : dims // 2]), -1)
    return torch.cat(((x * cos + turned * sin).to(input.dtype), input[..., dims:]), -1)


# --- reference ---


def _rows(table: Tensor, x: Tensor, starts: Tensor | None, start: int) -> Tensor:
    """The rows of ``table`` for x's tokens, broadcastable to (..., H, T, R / 2)."""
    length = x.shape[-2]
    if starts is None:
        return table[start : start + length]
    positions.in_range("rotary", "offsets", starts, length, table.shape[0], "cos")
    position = starts[:, None] + torch.arange(length, device=x.device)
    return table[position].reshape(x.shape[0], *(1,) * (x.dim() - 3), length, table.shape[1])


def reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    start: int,
    interleaved: bool,
    inverse: bool,
    transposed: bool,
) -> Tensor:
    """Turns by theta, or by -theta with ``inverse``; ``transposed`` lays the result out in memory as (..., T, H, D)."""
    c, s = accumulate(_rows(cos, x, starts, start)), accumulate(_rows(sin, x, starts, start))
    if inverse:
        s = -s
    dims = 2 * cos.shape[1]
    if interleaved:
        first, second = slice(0, dims, 2), slice(1, dims, 2)
    else:
        first, second = slice(0, dims // 2), slice(dims // 2, dims)
    x1, x2 = accumulate(x[..., first]), accumulate(x[..., second])
    y = _empty(x, transposed)
    y[..., first] = (x1 * c - x2 * s).to(x.dtype)
    y[..., second] = (x2 * c + x1 * s).to(x.dtype)
    y[..., dims:] = x[..., dims:]
    return y


def _new_empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(shape)


def _empty(x: Tensor, transposed: bool, empty: Callable[[Sequence[int], Tensor], Tensor] = _new_empty) -> Tensor:
    """Uninitialised, of x's shape; ``transposed``: a view of memory in (..., T, H, D) order."""
    if not transposed:
        return empty(x.shape, x)
    return empty((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]), x).transpose(-3, -2)


# --- kernels ---


def _as_heads(x: Tensor) -> Tensor:
    """As (B, H, T, D), a view if the leading dimensions allow it; (B, T, D) has one head."""
    if x.dim() == 2:
        return x[None, None]
    return x.unsqueeze(1) if x.dim() == 3 else x.flatten(0, -4)


def _native(
    kernels: Kernels,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    start: int,
    interleaved: bool,
    inverse: bool,
    transposed: bool,
) -> Tensor:
    y = _empty(x, transposed, memory.empty)
    if not x.numel():
        return y
    y4 = _as_heads(y)
    x4 = _as_heads(x if x.stride(-1) == 1 else x.contiguous())
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, length, dim = x4.shape
    rows = None if starts is None else starts[:, None].expand(-1, batch // starts.numel()).contiguous()
    try:
        kernels.rotary(
            y=y4,
            x=x4,
            cos=cos,
            sin=sin,
            starts=rows,
            start=start,
            batch=batch,
            heads=heads,
            length=length,
            dim=dim,
            rotated=2 * cos.shape[1],
            max_len=cos.shape[0],
            x_strides=x4.stride()[:3],
            y_strides=y4.stride()[:3],
            interleaved=interleaved,
            inverse=inverse,
            dtype=DTYPES[x.dtype],
            table_dtype=DTYPES[cos.dtype],
        )
    except IndexError:  # say it in the caller's terms
        if starts is not None:
            positions.in_range("rotary", "offsets", starts, length, cos.shape[0], "cos")
        raise
    return y


# --- registration ---


def _fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor | None,
    start: int,
    interleaved: bool,
    inverse: bool,
    transposed: bool,
) -> Tensor:
    return _empty(x, transposed)


class _Rotary(torch.autograd.Function):
    """A rotation is orthogonal: its gradient is the rotation by -theta, the same operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        starts: Tensor | None,
        start: int,
        interleaved: bool,
        inverse: bool,
        transposed: bool,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, starts)
        # In the model x is (B, T, H, D) seen as (B, H, T, D): its gradient in the same memory order needs no copy on
        # its way to the projection.
        x_transposed = x.dim() > 2 and x.stride(-3) < x.stride(-2)
        ctx.options = (start, interleaved, not inverse, x_transposed, backend)
        return registry.below_autograd(_op, x, cos, sin, starts, start, interleaved, inverse, transposed, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, starts = ctx.saved_tensors
        return _op(dy, cos, sin, starts, *ctx.options), *(None,) * 8


_op = registry.define(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, Tensor? starts, SymInt start, bool interleaved, bool inverse, bool transposed)"
    " -> Tensor",
    {"reference": reference, **native.backends(_native)},
    _fake,
    _Rotary,
)
