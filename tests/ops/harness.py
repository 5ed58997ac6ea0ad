"""What every operator's suite shares: the error budget, memory layouts, and the checks of the registration.

The budget is ``fastgpt.ops.accuracy``'s: at most twice plain torch's error in the same dtype, plus one rounding.

Tests make their tensors on the CPU and call the operators through ``harness.ops``, which carries the tensors to where
the backend wants them and its results back. So one test serves every backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgpt
from fastgpt.ops import native
from fastgpt.ops.accuracy import error_and_budget
from tests import triton_runner
from tests.conftest import SCHEDULES

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# In `make sanitize`, whose build rounds otherwise, being optimised otherwise: the normal build is held to the budget.
SANITIZED = "FASTGPT_SANITIZED" in os.environ
Function = Callable[..., Any]  # run(backend, **tensors) -> Tensor or tuple of Tensors


def backends(op: str) -> list[Any]:
    """The backends of ``op``, for pytest.mark.parametrize; each must meet the same budget."""
    without_gpu = [backend for backend in ("triton", "simt") if native.has_kernel(backend, op)]
    return ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu), *without_gpu]


def takes_seconds(backend: str) -> bool:
    """Whether a call takes seconds, as on Triton's runners without a GPU."""
    return backend == "triton" and triton_runner.RUNNER != "GPU"


def backends_without_interpreters(op: str) -> list[Any]:
    """The same for tests of many calls: without a GPU, a call of Triton takes a second."""
    return [b for b in backends(op) if not takes_seconds(b)]


def backends_here(op: str) -> list[str]:
    """The names of those that run on this machine, for tests that compare them with each other."""
    here = ["reference", *(b for b in ("cpu", "cuda", "simt") if native.has_kernel(b, op))]
    return [b for b in here if b != "cuda" or torch.cuda.is_available()]


# --- devices ---


def device(backend: str | None) -> torch.device:
    """Where a backend wants its tensors. The reference and torch run anywhere: on the CPU, then."""
    return torch.device(native.DEVICE_TYPES.get(backend or "", "cpu"))


def copy_of(tensor: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """A copy with the same strides, as far from the start of its memory as ``tensor`` is from its own."""
    tensor = tensor.detach()
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    memory = memory.to(device or tensor.device, dtype or tensor.dtype, copy=True)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Carry(torch.autograd.Function):
    """``copy_of`` with a gradient, which goes the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.device = tensor.device
        return copy_of(tensor, device=device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.device), None


def carried(value: Any, device: torch.device, pairs: list[tuple[Tensor, Tensor]] | None = None) -> Any:
    """``value``, with a copy on ``device`` of every tensor in it; ``pairs`` receives (tensor, its copy)."""
    if isinstance(value, Tensor):
        copy = _Carry.apply(value, device)
        if pairs is not None:
            pairs.append((value, copy))
        return copy
    if isinstance(value, (list, tuple)):
        return type(value)(carried(v, device, pairs) for v in value)
    if isinstance(value, dict):
        return {k: carried(v, device, pairs) for k, v in value.items()}
    return value


def call_there(function: Function, there: torch.device, *args: Any, **options: Any) -> Any:
    """``function`` with all tensors on the device ``there``; results, gradients and what changed in place come back."""
    pairs: list[tuple[Tensor, Tensor]] = []
    args, options = carried(args, there, pairs), carried(options, there, pairs)
    before = [copy._version for _, copy in pairs]
    results = carried(function(*args, **options), torch.device("cpu"))
    with torch.no_grad():
        for (original, copy), version in zip(pairs, before, strict=True):
            if copy._version != version:
                original.copy_(copy)
    return results


def _everywhere(function: Function) -> Function:
    def call(*args: Any, **options: Any) -> Any:
        there = device(options.get("backend"))
        return function(*args, **options) if there.type == "cpu" else call_there(function, there, *args, **options)

    return call


# fastgpt.ops for tensors on the CPU, whatever the backend's device.
ops = SimpleNamespace(**{name: _everywhere(getattr(fastgpt.ops, name)) for name in fastgpt.ops.__all__})


def raw(op: str, *arguments: Any) -> Any:
    """``torch.ops.fastgpt.op``, whose last argument is the backend, for tensors on the CPU."""
    function, there = getattr(torch.ops.fastgpt, op), device(arguments[-1])
    return function(*arguments) if there.type == "cpu" else call_there(function, there, *arguments)


# --- the budget ---


# Backends that look at the data before they return: a bad index is an IndexError of theirs.
SYNCHRONOUS = ("reference", "cpu")


def asynchronous_backends(op: str) -> list[Any]:
    """The other backends of ``op``: a GPU would have to be waited for, so a bad index shows as NaN in the result."""
    return [backend for backend in backends(op) if backend not in SYNCHRONOUS]


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in ``dtype``, as leaves that want gradients where the original did; the rest untouched.

    Views keep their strides and their alignment.
    """
    return {
        name: copy_of(t, dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for name, t in tensors.items()
    }


def run_with_gradients(
    run: Function, backend: str, tensors: dict[str, Tensor], upstream: list[Tensor] | None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs, and the gradient of sum(output * upstream) for every tensor that wants one."""
    outputs = tensors_of(run(backend, **tensors))
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    if upstream is None or not wanted:
        return [o.detach() for o in outputs], {}
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs])
    return [o.detach() for o in outputs], dict(zip(wanted, gradients, strict=True))


def assert_within_budget(what: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """``actual`` has the shape, dtype and accuracy that it should; NaN and infinity only where ``exact`` has them."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, torch gives {plain.dtype}"
    if SANITIZED:
        return
    error, allowed = error_and_budget(actual, plain, exact)
    assert error <= allowed, f"{what}: error {error:.3e} is over the budget {allowed:.3e}"


def check(
    run: Function,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    gradients: bool = True,
    seed: int = 0,
) -> None:
    """Compares outputs and gradients of ``run(backend, **tensors)`` with float64 torch, within the budget.

    ``tensors`` are float64 (requires_grad where a gradient is wanted) or integer; views keep their strides. Inputs must
    come back unchanged, byte for byte.
    """
    inputs = cast(tensors, dtype)
    exact_inputs = cast(inputs, torch.float64)
    before = {name: t.detach().clone() for name, t in inputs.items()}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = [o.shape for o in tensors_of(run("torch", **exact_inputs))]
    upstream = (
        [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] if gradients else None
    )
    exact, exact_gradients = run_with_gradients(run, "torch", exact_inputs, upstream)
    plain, plain_gradients = run_with_gradients(run, "torch", cast(inputs, dtype), upstream)
    actual, actual_gradients = run_with_gradients(run, backend, inputs, upstream)

    assert len(actual) == len(exact)
    for i, (a, p, e) in enumerate(zip(actual, plain, exact, strict=True)):
        assert_within_budget(f"output {i}", a, p, e)
    assert actual_gradients.keys() == exact_gradients.keys()
    for name, e in exact_gradients.items():
        assert_within_budget(f"gradient of {name}", actual_gradients[name], plain_gradients[name], e)
    for name, t in inputs.items():
        assert (
            torch.equal(t.detach().view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8))
            if (t.is_contiguous() and t.dim() and t.numel())
            else torch.equal(t.detach().nan_to_num(), before[name].nan_to_num())
        ), f"{name} was changed"


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values contiguous, as a view one element past an aligned address, and as a transposed view."""
    yield "contiguous", tensor.contiguous()
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = buffer[1:].view(tensor.shape)
    view.copy_(tensor)
    yield "misaligned", view
    if tensor.dim() >= 2:
        yield "transposed", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def opcheck(op: str, arguments: tuple[Any, ...]) -> None:
    """torch's own checks of the schema, the autograd registration, the fake and AOT dispatch of ``fastgpt::op``."""
    there = device(arguments[-1])
    if there.type != "cpu":
        pairs: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            arguments = carried(arguments, there, pairs)
        for original, copy in pairs:
            copy.requires_grad_(original.requires_grad)
    torch.library.opcheck(getattr(torch.ops.fastgpt, op).default, arguments)


def under_every_schedule(run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """What ``run()`` gives under each of the emulator's schedules."""
    simt = pytest.importorskip("fastgpt._simt", reason="this build has no emulator (FASTGPT_SIMT=on)")
    results = []
    for schedule in SCHEDULES:
        simt.configure(**schedule)
        results.append(run())
    return results


def assert_same_bits(results: list[list[Tensor]], what: str) -> None:
    """All results are bitwise equal to the first."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), what
