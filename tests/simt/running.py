"""Runs the kernels of a file like ptx_kernels.cu, by name, from numpy arrays."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from tests.simt import build

FOLDER = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")


class _Run(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("lazy", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint64),
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
    ]


class KernelError(Exception):
    """What the emulator found wrong."""


def aligned(count: int) -> np.ndarray:
    """``count`` words that begin at a multiple of 256 bytes, so that alignment is what the kernel makes of it."""
    memory = np.zeros(count * 4 + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + count * 4].view(np.uint32)


class Kernels:
    """The kernels of tests/simt/<name>.cu. A kernel takes words and gives words."""

    def __init__(self, name: str) -> None:
        self._library = build.library(FOLDER / f"{name}.cu", checked=False)

    def __call__(
        self,
        kernel: str,
        words: np.ndarray | None = None,
        out: int = 32,
        *,
        grid: tuple[int, ...] = (1,),
        block: tuple[int, ...] = (32,),
        shared: int = 0,
        shared_limit: int = 99 * 1024,
        order: str = "forward",
        seed: int = 0,
        lazy: bool = False,
        fill: int = 0xDEADBEEF,
    ) -> np.ndarray:
        """``out`` words that the kernel wrote, ``fill`` where it wrote nothing. Raises KernelError."""
        given = np.zeros(0, np.uint32) if words is None else np.ascontiguousarray(words).reshape(-1).view(np.uint32)
        source, target = aligned(len(given)), aligned(out)
        source[:] = given
        target[:] = fill
        three = [(ctypes.c_uint * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
        description = _Run(
            kernel.encode(), ORDERS.index(order), seed, lazy, *three, shared, shared_limit,
            source.ctypes.data, target.ctypes.data,
        )  # fmt: skip
        message = ctypes.create_string_buffer(2000)
        self._library.run(ctypes.byref(description), message, len(message))
        if message.value:
            raise KernelError(message.value.decode())
        return target
