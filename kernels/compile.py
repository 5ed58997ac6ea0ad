"""Compiles recorded launches (``launch.recording``) for an architecture, as a machine with that GPU would, without one.

Triton's own binder decides what a kernel is specialised on (the dtype of every argument, integers that are 1 or
multiples of 16, pointers that are aligned to 16 bytes), so that the code is production's and not a slower cousin of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from fastgpt.kernels.launch import Launch


@dataclass(frozen=True)
class Variant:
    """What one launch becomes with one of its configurations. ``default``: it is the preferred one, which also runs
    where nothing may be timed. ``key``: equal for launches that run the same code."""

    launch: Launch
    config: triton.Config
    default: bool
    target: GPUTarget
    source: ASTSource
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.launch.kernel.__name__)

    @property
    def file(self) -> str:
        """The stem of the file in kernels/ that holds the kernel."""
        return str(self.launch.kernel.fn.__module__).rpartition(".")[2]

    @property
    def configuration(self) -> str:
        """As in ``BLOCK=128 warps=4 stages=2``."""
        constants = " ".join(f"{name}={value}" for name, value in self.config.kwargs.items())
        return f"{constants} warps={self.config.num_warps} stages={self.config.num_stages}".strip()

    @property
    def key(self) -> str:
        return f"{self.name} {self.source.hash()} {sorted(self.options.items(), key=str)}"


def target_of(architecture: str) -> GPUTarget:
    """``sm_90`` or, for AMD, ``gfx942``."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def variants(launch: Launch, target: GPUTarget) -> Iterator[Variant]:
    """One for each configuration that the launch can choose on the target."""
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    for index, config in enumerate(launch.configs(target)):
        named = {"num_warps": config.num_warps, "num_stages": config.num_stages, **launch.options}
        named = {**launch.constants_with(config), **named}
        bound, specialization, options = bind(*launch.args_with(config), **named)
        options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialization, options)
        source = ASTSource(kernel, signature, constants, attributes)
        yield Variant(launch, config, index == 0, target, source, options.__dict__)


def compiled(variant: Variant) -> CompiledKernel:
    """The code, from Triton's cache on disk where it is there already."""
    return triton.compile(variant.source, target=variant.target, options=variant.options)


def binary(kernel: CompiledKernel, suffix: str) -> Path:
    """Where Triton's cache keeps a stage of a compiled kernel: its "cubin", its "amdgcn"."""
    return next(Path(path) for name, path in kernel.metadata_group.items() if name.endswith(f".{suffix}"))
