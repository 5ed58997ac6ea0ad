"""OpSet: every operator with its backend chosen, behind one object. A model takes all its operators from here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastgpt import ops
from fastgpt.ops import registry


def _operators() -> list[str]:
    """What fastgpt.ops exports and torch knows as an operator of ours."""
    return [name for name in ops.__all__ if hasattr(torch.ops.fastgpt, name)]


class OpSet:
    """``OpSet("reference").layer_norm(...)`` is ``ops.layer_norm(..., backend="reference")``, and so for all operators.

    Args:
        spec: one backend for all operators: "fused" (the owner on the tensors' device), "reference", "torch", or a
            backend by name such as "cpu"; or a mapping {operator: backend}, in which "default" (itself "fused" if
            absent) stands for the operators that it does not name.

    Raises:
        ValueError: an operator or backend that does not exist.
    """

    def __init__(self, spec: str | Mapping[str, str] | OpSet = "fused") -> None:
        if isinstance(spec, OpSet):
            spec = spec.spec
        if not isinstance(spec, (str, Mapping)):
            raise TypeError(f"ops={spec!r} must be a backend's name or a mapping {{operator: backend}}")
        chosen = {"default": spec} if isinstance(spec, str) else {"default": "fused", **spec}
        names = _operators()
        self._backends = {name: chosen.get(name, chosen["default"]) for name in names}
        unknown = sorted(set(chosen) - set(names) - {"default"})
        if unknown:
            raise ValueError(f"ops: unknown operator {', '.join(map(repr, unknown))}; there are {', '.join(names)}")
        for name, backend in self._backends.items():
            allowed = ("fused", *registry.backends(name), "torch")
            if backend not in allowed:
                raise ValueError(f"ops: {name} has no backend {backend!r}; allowed are {', '.join(map(repr, allowed))}")
            if why := registry.missing(name, backend):
                raise ValueError(f"ops: {name} cannot have the backend {backend!r}: {why}")
            function = getattr(ops, name)
            # The plain function is a partial less to call: decoding small models feels it.
            setattr(self, name, function if backend == "fused" else functools.partial(function, backend=backend))
        self.spec: str | dict[str, str] = spec if isinstance(spec, str) else dict(spec)

    def backend(self, name: str) -> str:
        """The backend chosen for an operator: "fused", or one by name."""
        return self._backends[name]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"OpSet has no operator {name!r}; there are {', '.join(_operators())}")

    def __repr__(self) -> str:
        return f"OpSet({self.spec!r})"
