"""What every operator's suite shares: the error budget, memory layouts, and the checks of the registration.

The budget is ``fastgpt.ops.accuracy``'s: at most twice plain torch's error in the same dtype, plus one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops import native
from fastgpt.ops.accuracy import error_and_budget

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Function = Callable[..., Any]  # run(backend, **tensors) -> Tensor or tuple of Tensors


def backends(op: str) -> tuple[str, ...]:
    """The backends of ``op`` that run here; each must meet the same budget."""
    return ("reference", "cpu", "simt") if native.has_kernel("simt", op) else ("reference", "cpu")


# Backends that look at the data before they return: a bad index is an IndexError of theirs.
SYNCHRONOUS = ("reference", "cpu")


def asynchronous_backends(op: str) -> list[Any]:
    """The other backends of ``op``: a GPU would have to be waited for, so a bad index shows as NaN in the result."""
    return [backend for backend in backends(op) if backend not in SYNCHRONOUS]


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in ``dtype``, as leaves that want gradients where the original did; the rest untouched."""
    return {
        name: t.detach().to(dtype).clone(memory_format=torch.preserve_format).requires_grad_(t.requires_grad)
        if t.is_floating_point()
        else t
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
    torch.library.opcheck(getattr(torch.ops.fastgpt, op).default, arguments)


def assert_same_bits(results: list[list[Tensor]], what: str) -> None:
    """All results are bitwise equal to the first."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), what
