"""adamw: one step over many tensors in place, and the gradients' global norm (Loshchilov and Hutter, 2019).

The formulas are fastgpt/ops/adamw.py's. Bytes (float32): reads p, grad, m, v and writes p, m, v: 28 an element; about
25 operations: memory decides. Without clipping the norm rides along in that pass; with it, the gradients are read once
more first (4 bytes), never written.

A launch takes TENSORS tensors of the same dtypes, as tuples of pointers among the kernel's arguments, and has as many
programs as those have chunks; a program finds its tensor by going through them, few beside its elements. So GPT-2's
148 tensors are ten launches, no table of addresses is copied to the device, and a CUDA graph holds all it needs.

Squares are summed in double, by chunk, and the chunks' sums by one program, always in the same order, and so that they
do not overflow where a float's square would. The clipping coefficient stays on the device: the update reads it there.
Products and sums of the update are not fused, so that an element's bits do not depend on the alignment of its tensor.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.launch import launch, one_config

TENSORS = 16
CHUNK = 8192  # elements of a program
CONFIGS = one_config(CHUNK=CHUNK, BLOCK=4096, num_warps=16)  # a block at a time, 8 elements a thread


# --- kernels ---


# Triton compiles a kernel anew for each integer of a tuple that becomes 1 or a multiple of 16. So ``sizes`` and
# ``first_chunks`` hold 2 n + 3 for a number n, which is neither.


@triton.jit(do_not_specialize_on_alignment=["squares"])
def grad_squares_kernel(
    squares, grads, sizes, first_chunks, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """squares[chunk] = the sum of the squares of the chunk's gradients."""
    chunk = tl.program_id(0)
    grad, size, first_chunk = grads[0], sizes[0], first_chunks[0]
    for i in tl.static_range(1, TENSORS):
        here = 2 * chunk + 3 >= first_chunks[i]
        grad = tl.where(here, grads[i], grad)
        size = tl.where(here, sizes[i], size)
        first_chunk = tl.where(here, first_chunks[i], first_chunk)
    size, first_chunk = (size >> 1) - 1, (first_chunk >> 1) - 1
    offset = (chunk - first_chunk).to(tl.int64) * CHUNK
    left = tl.minimum(size - offset, CHUNK).to(tl.int32)
    grad += offset
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    if left == CHUNK:
        for start in range(0, CHUNK, BLOCK):
            g = tl.load(grad + start + lane).to(tl.float64)
            sums += g * g
    else:
        for start in range(0, left, BLOCK):
            g = tl.load(grad + start + lane, mask=start + lane < left, other=0.0).to(tl.float64)
            sums += g * g
    tl.store(squares + chunk, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["chunks"])
def grad_norm_kernel(
    norm, factor, squares, chunks, given, max_norm: tl.float64, grad_scale: tl.float64, MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """norm = sqrt(sum of squares) / grad_scale, or *given. Where wanted also factor, what a gradient is multiplied by:
    +-min(1, max_norm / (norm + 1e-6)) / grad_scale, or NaN where the norm is not finite."""
    if given is not None:
        found = tl.load(given)
    else:
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, chunks, BLOCK):
            at = start + tl.arange(0, BLOCK)
            sums += tl.load(squares + at, mask=at < chunks, other=0.0)
        found = (tl.sqrt(tl.sum(sums, 0)) / grad_scale).to(tl.float32)
    tl.store(norm, found)
    if factor is not None:
        clip = max_norm / (found.to(tl.float64) + 1e-6)
        clip = tl.where(clip < 1.0, clip, 1.0) / grad_scale
        if MAXIMIZE:
            clip = -clip
        tl.store(factor, tl.where(found < float("inf"), clip, float("nan")).to(tl.float32))


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, master, at, inside, grad_factor, one_minus_beta1, beta2, one_minus_beta2,
    decay, step_size, inverse_root_correction, eps
):  # fmt: skip
    """One block of a chunk, of which all is ``inside`` if that is None. Returns the gradients."""
    other: tl.constexpr = None if inside is None else 0.0
    raw = tl.load(grad + at, mask=inside, other=other).to(tl.float32)
    m = tl.load(exp_avg + at, mask=inside, other=other)
    v = tl.load(exp_avg_sq + at, mask=inside, other=other)
    p = tl.load((param if master is None else master) + at, mask=inside, other=other).to(tl.float32)
    g = raw * grad_factor
    m += (g - m) * one_minus_beta1
    v = v * beta2 + g * one_minus_beta2 * g
    p = p * decay - tl.div_rn(m * step_size, tl.sqrt_rn(v) * inverse_root_correction + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    if master is not None:
        tl.store(master + at, p, mask=inside)
    tl.store(param + at, p.to(param.dtype.element_ty), mask=inside)
    return raw.to(tl.float64)


@triton.jit(do_not_specialize_on_alignment=["squares"])
def adamw_kernel(
    squares, factor, parameters, grads, exp_avgs, exp_avg_sqs, masters, sizes, first_chunks, grad_factor,
    one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_root_correction, eps, ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``factor``: of gradients, instead of ``grad_factor``; NaN: no update. ``squares``: as grad_squares_kernel's.
    (An argument called ``params`` would be lost to a variable of that name in Triton's binder.)"""
    if factor is not None:
        grad_factor = tl.load(factor)
    if grad_factor == grad_factor:
        chunk = tl.program_id(0)
        param, grad, exp_avg, exp_avg_sq = parameters[0], grads[0], exp_avgs[0], exp_avg_sqs[0]
        master = None if masters is None else masters[0]
        size, first_chunk = sizes[0], first_chunks[0]
        for i in tl.static_range(1, TENSORS):
            here = 2 * chunk + 3 >= first_chunks[i]
            param = tl.where(here, parameters[i], param)
            grad = tl.where(here, grads[i], grad)
            exp_avg = tl.where(here, exp_avgs[i], exp_avg)
            exp_avg_sq = tl.where(here, exp_avg_sqs[i], exp_avg_sq)
            if masters is not None:
                master = tl.where(here, masters[i], master)
            size = tl.where(here, sizes[i], size)
            first_chunk = tl.where(here, first_chunks[i], first_chunk)
        size, first_chunk = (size >> 1) - 1, (first_chunk >> 1) - 1
        offset = (chunk - first_chunk).to(tl.int64) * CHUNK
        left = tl.minimum(size - offset, CHUNK).to(tl.int32)
        param, grad, exp_avg, exp_avg_sq = param + offset, grad + offset, exp_avg + offset, exp_avg_sq + offset
        if master is not None:
            master += offset
        if ALIGNED:
            param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
            exp_avg, exp_avg_sq = tl.multiple_of(exp_avg, 16), tl.multiple_of(exp_avg_sq, 16)
            if master is not None:
                master = tl.multiple_of(master, 16)
        lane = tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float64)
        if left == CHUNK:
            for start in range(0, CHUNK, BLOCK):
                g = _update(
                    param, grad, exp_avg, exp_avg_sq, master, start + lane, None, grad_factor, one_minus_beta1,
                    beta2, one_minus_beta2, decay, step_size, inverse_root_correction, eps
                )  # fmt: skip
                if squares is not None:
                    sums += g * g
        else:
            for start in range(0, left, BLOCK):
                g = _update(
                    param, grad, exp_avg, exp_avg_sq, master, start + lane, start + lane < left, grad_factor,
                    one_minus_beta1, beta2, one_minus_beta2, decay, step_size, inverse_root_correction, eps
                )  # fmt: skip
                if squares is not None:
                    sums += g * g
        if squares is not None:
            tl.store(squares + chunk, tl.sum(sums, 0))


# --- launches ---


class _Group(NamedTuple):
    """Up to TENSORS tensors that a launch takes. Where they are fewer the first stands for the missing ones, whose
    first chunk no program reaches."""

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    first_chunks: tuple[int, ...]
    chunks: int
    aligned: bool


def _groups(sizes: Sequence[int], *lists: Sequence[Tensor]) -> Iterator[_Group]:
    """The tensors that have elements, sorted by their dtypes, by which lists hold one for them, and by whether all of
    theirs lie at multiples of 16 bytes."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, size in enumerate(sizes):
        if size:
            mine = [tensors[i] for tensors in lists]
            aligned = not any(t.data_ptr() % 16 for t in mine)
            alike.setdefault((*((t.dtype, bool(t.numel())) for t in mine), aligned), []).append(i)
    for (*_, aligned), all_members in alike.items():
        for first in range(0, len(all_members), TENSORS):
            members = all_members[first : first + TENSORS]
            ends = list(itertools.accumulate(triton.cdiv(sizes[i], CHUNK) for i in members))
            padding = TENSORS - len(members)
            yield _Group(
                members=(*members, *members[:1] * padding),
                sizes=tuple(2 * n + 3 for n in (*(sizes[i] for i in members), *[0] * padding)),
                first_chunks=tuple(2 * n + 3 for n in (0, *ends[:-1], *ends[-1:] * padding)),
                chunks=ends[-1],
                aligned=bool(aligned),
            )


def _chunks(sizes: Sequence[int]) -> int:
    return sum(triton.cdiv(size, CHUNK) for size in sizes)


def _sum_squares(squares: Tensor, grads: Sequence[Tensor], sizes: Sequence[int]) -> None:
    done = 0
    for group in _groups(sizes, grads):
        launch(
            grad_squares_kernel, (group.chunks,), squares[done:], tuple(grads[i] for i in group.members), group.sizes,
            group.first_chunks, configs=CONFIGS, ALIGNED=group.aligned, TENSORS=TENSORS,
        )  # fmt: skip
        done += group.chunks


def _find_norm(
    norm: Tensor, factor: Tensor | None, squares: Tensor | None, given: Tensor | None, max_norm: float,
    grad_scale: float, maximize: bool,
) -> None:  # fmt: skip
    launch(
        grad_norm_kernel, (1,), norm, factor, squares, 0 if squares is None else squares.numel(), given,
        float(max_norm), float(grad_scale), configs=one_config(BLOCK=1024), MAXIMIZE=maximize,
    )  # fmt: skip


def grad_norm(
    *, norm: Tensor, grads: Sequence[Tensor], sizes: Sequence[int], grad_dtypes: Sequence[int], count: int,
    grad_scale: float,
) -> None:  # fmt: skip
    squares = torch.empty(_chunks(sizes), dtype=torch.float64, device=norm.device)
    _sum_squares(squares, grads, sizes)
    _find_norm(norm, None, squares, None, 0.0, grad_scale, False)


def adamw(
    *, params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor], sizes: Sequence[int], param_dtypes: Sequence[int], grad_dtypes: Sequence[int],
    count: int, norm: Tensor, total_norm: Tensor | None, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, max_norm: float, grad_scale: float, maximize: bool,
) -> None:  # fmt: skip
    squares = None
    if total_norm is None:
        squares = torch.empty(_chunks(sizes), dtype=torch.float64, device=norm.device)
    factor = None
    if max_norm > 0:
        factor = torch.empty((), dtype=torch.float32, device=norm.device)
        if squares is not None:
            _sum_squares(squares, grads, sizes)
        _find_norm(norm, factor, squares, total_norm, max_norm, grad_scale, maximize)
    scalars = (
        (-1 if maximize else 1) / grad_scale,
        1 - beta1,
        beta2,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
    done = 0
    for group in _groups(sizes, params, grads, exp_avgs, exp_avg_sqs, masters):
        pointers = [tuple(tensors[i] for i in group.members) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        has_masters = masters[group.members[0]].numel() > 0
        launch(
            adamw_kernel, (group.chunks,), None if squares is None or factor is not None else squares[done:], factor,
            *pointers, tuple(masters[i] for i in group.members) if has_masters else None, group.sizes,
            group.first_chunks, *scalars, configs=CONFIGS, fp_fusion=False, ALIGNED=group.aligned, TENSORS=TENSORS,
        )  # fmt: skip
        done += group.chunks
    if factor is None:
        _find_norm(norm, None, squares, total_norm, max_norm, grad_scale, maximize)
