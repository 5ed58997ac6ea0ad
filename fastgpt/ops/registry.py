"""Who runs an operator: definitions, the choice of a backend (``owners`` has the table), strict mode, ``explain()``.

An operator ``name`` is registered with torch as ``fastgpt::name``. Its last argument is the backend's name, so the
choice is part of the graph that ``torch.compile`` sees. ``fastgpt::name_backward`` is an operator of its own and
dispatches the same way.

Registration goes through ``torch.library.Library`` (a Python function costs 2.5 us a call there; ``custom_op`` 14 to
31): the kernel call under CompositeExplicitAutograd, an ``autograd.Function`` that calls the operator below autograd
under Autograd, and a fake for the Meta key and FakeTensor.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt.ops import native, owners
from fastgpt.ops.native import _C
from fastgpt.ops.owners import Owner, Place

# Backend implementations: _IMPLEMENTATIONS["layer_norm"]["cpu"] is called with the schema's arguments less the backend.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
# Why an operator cannot run on a backend in this build: a matter of the build, so it is found out once.
_MISSING: dict[tuple[str, str], str] = {}
_FALLBACKS: Counter[tuple[str, str]] = Counter()
_strict = os.environ.get("FASTGPT_STRICT", "0") not in ("", "0")

_library = torch.library.Library("fastgpt", "DEF")


class FallbackError(RuntimeError):
    """Strict mode: a fused operator was asked for something that only the reference computes."""


def define(
    name: str,
    schema: str,
    backends: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> Callable[..., Any]:
    """Registers ``fastgpt::name`` and returns the function to call it by.

    Args:
        schema: arguments and results in torch's schema language, without the name and without the last argument
            ``str backend``, which is added here: ``"(Tensor x, float eps) -> Tensor"``.
        backends: one implementation per backend, called with the schema's arguments.
        fake: shapes and dtypes of the results, from the schema's arguments.
        autograd: its ``forward(ctx, *arguments, backend)`` must call ``below_autograd(op, ...)``. Without it the
            operator has no derivative.
    """
    arguments, results = schema.split("->")
    arguments = arguments.strip()[:-1].rstrip().removesuffix(",")
    _library.define(f"{name}{arguments}{',' if not arguments.endswith('(') else ''} str backend) -> {results.strip()}")
    _IMPLEMENTATIONS[name] = backends
    for backend in backends:
        if backend in native.DEVICE_TYPES and (why := native.missing(backend, name)):
            _MISSING[name, backend] = why
    op = getattr(torch.ops.fastgpt, name).default

    def run(*args: Any) -> Any:
        return _IMPLEMENTATIONS[name][args[-1]](*args[:-1])

    def run_fake(*args: Any) -> Any:
        return fake(*args[:-1])

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{name}", run_fake, lib=_library)

    if autograd is not None:

        def run_autograd(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                return autograd.apply(*args)
            return below_autograd(op, *args)

        _library.impl(name, run_autograd, "Autograd")
    elif name.endswith("_backward"):

        def run_backward(*args: Any) -> Any:
            if not (torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)):
                return below_autograd(op, *args)
            # A second derivative may be wanted (create_graph=True). The reference is plain torch and has one.
            return run(*args) if args[-1] == "reference" else _Once.apply(name, op, *args)

        _library.impl(name, run_backward, "Autograd")
    return op


class _Once(torch.autograd.Function):
    """A fused backward: its results have no derivative, and asking for one is an error rather than a wrong number."""

    @staticmethod
    def forward(ctx: Any, name: str, op: Callable[..., Any], *args: Any) -> Any:
        ctx.name, ctx.backend = name, args[-1]
        return below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{ctx.name}: backend={ctx.backend!r} has no second derivative; backend='reference' has one"
        )


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator's kernel, past its Autograd registration."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_second_derivative(name: str) -> None:
    """For the backward of an autograd.Function that saves results of the forward: their dependence on the inputs is
    lost to a second derivative, so it is an error rather than a wrong number."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: the gradient has no derivative of its own, so create_graph=True is not possible; "
            "backend='torch' can be differentiated twice"
        )


def owner_on(name: str, place: Place, dtype: torch.dtype | None = None) -> Owner:
    """Who runs operator ``name`` at a place: the first of the table's row that this build has. The reason tells which
    it lacks."""
    lacking: list[str] = []
    for owner in owners.owners(name, place, dtype):
        why = _MISSING.get((name, owner.backend))
        if why is None:
            return Owner(owner.backend, "; ".join([*lacking, owner.reason]))
        if why not in lacking:
            lacking.append(why)
    return Owner("reference", "; ".join(lacking) or f"no fused kernel for device type {place.device_type}")


def backends(name: str) -> tuple[str, ...]:
    """The backends that implement operator ``name``."""
    return tuple(_IMPLEMENTATIONS[name])


def missing(name: str, backend: str) -> str | None:
    """Why operator ``name`` cannot run on ``backend`` in this build, or None if it can."""
    return _MISSING.get((name, backend))


def operators() -> tuple[str, ...]:
    """The public operators, in alphabetical order."""
    return tuple(sorted(owners.TABLE))


def resolve(
    name: str,
    requested: str | None,
    device: torch.device,
    refusal: str | dict[str, str] | None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend that will run this call.

    Args:
        requested: the caller's ``backend=``; None and ``"fused"`` mean the owner.
        refusal: why the fused kernels cannot take these arguments, or None if they can; a dict {backend: why} where
            backends differ, which leaves out those that can.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: a backend asked for by name that cannot take these arguments, or that this build lacks.
        FallbackError: strict mode, and only the reference can.
    """
    if requested is not None and requested != "fused":
        if requested not in ("reference", "torch", *_IMPLEMENTATIONS[name]):
            allowed = ", ".join(repr(b) for b in ("fused", *_IMPLEMENTATIONS[name], "torch"))
            raise ValueError(f"{name}: backend={requested!r} is unknown; allowed are {allowed}")
        if requested in ("reference", "torch"):
            return requested
        if (name, requested) in _MISSING:
            raise NotImplementedError(f"{name}: backend={requested!r} is not possible: {_MISSING[name, requested]}")
        if device.type != native.DEVICE_TYPES[requested]:
            raise NotImplementedError(f"{name}: backend={requested!r} cannot take tensors on {device}")
        why = refusal.get(requested) if isinstance(refusal, dict) else refusal
        if why is not None:
            raise NotImplementedError(f"{name}: backend={requested!r} does not take {why}; backend='reference' does")
        return requested
    place = owners.place(device)
    reasons = []
    for backend, _ in owners.owners(name, place, dtype):
        why = _MISSING.get((name, backend)) or (refusal.get(backend) if isinstance(refusal, dict) else refusal)
        if why is None:
            return backend
        reasons.append(why)
    why = reasons[0] if reasons else owner_on(name, place).reason
    if _strict:
        raise FallbackError(f"{name}: the fused kernel does not take {why}, and strict mode refuses the reference")
    _note_fallback(name, why)
    return "reference"


@owners.constant_when_compiled
def _note_fallback(name: str, why: str) -> bool:
    _FALLBACKS[name, why] += 1
    return True


def fallbacks() -> dict[tuple[str, str], int]:
    """Every fallback to the reference in this process so far: (operator, reason) -> calls."""
    return dict(_FALLBACKS)


def set_strict(enabled: bool) -> None:
    """Whether a fused operator may fall back to the reference: True refuses it. FASTGPT_STRICT=1 sets it at import."""
    global _strict
    _strict = bool(enabled)


@contextlib.contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """``with fastgpt.strict():`` refuses every fallback to the reference inside the block."""
    before = _strict
    set_strict(enabled)
    try:
        yield
    finally:
        set_strict(before)


def table(name: str) -> list[tuple[str, str, str]]:
    """(where, backend, reason): an operator's owners on the CPU and on GPUs, by architecture where they differ."""
    if torch.version.hip is not None:
        places = {"cpu ": Place("cpu"), "rocm": Place("rocm")}
        return [(where, *owner_on(name, place)) for where, place in places.items()]
    rows = [("cpu ", *owner_on(name, Place("cpu"))), ("cuda", *owner_on(name, Place("cuda")))]
    if majors := owners.TABLE[name].triton_first:
        where = ", ".join(f"sm_{major}0" for major in majors)
        rows.append((f"cuda, 16 bits on {where}", *owner_on(name, Place("cuda", (majors[0], 0)), torch.bfloat16)))
    return rows


def explain(file: Any = None) -> None:
    """Prints which backend owns each operator on this machine, what the other ones are, and past fallbacks."""
    isas = ", ".join(f"{isa}{'' if supported else ' (not on this machine)'}" for isa, _, supported in _C.cpu.isas())
    lines = [f"CPU kernels: {_C.cpu.isa()} of {isas}", f"CUDA: {native.cuda_summary()}", ""]
    width = max(map(len, operators()), default=0)
    for name in operators():
        lines += [f"{name:{width}}  {where} -> {backend}: {reason}" for where, backend, reason in table(name)]
    lines += [
        "",
        "Beside the owners, by name, for every operator:",
        "  reference: the readable formula; takes every dtype and option",
        "  torch: torch.nn.functional, the peer that benchmarks compare with",
        "  triton: the kernels of the folder kernels/, on CUDA tensors, where there is one",
        f"  simt: the CUDA kernels on CPU tensors, slowly, for tests; {native.simt_summary()}",
    ]
    if _FALLBACKS:
        lines += ["", "Fallbacks to the reference in this process:"]
        lines += [f"  {name}: {count} x {why}" for (name, why), count in sorted(_FALLBACKS.items())]
    print("\n".join(lines), file=file)
