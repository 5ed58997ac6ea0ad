"""What this machine can do at best, measured in the same run as the kernels: the floor that they are held against.

The floor of a call is the greater of bytes / bandwidth and flops / rate of matrix products in its dtype. Bandwidth is
that of memory beyond the caches, the better of copying and reading, so a call whose data stay in the cache can beat it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_BYTES = 256 << 20
_SHAPES = ((512, 512, 512), (1024, 3072, 768), (2048, 2048, 2048))  # (M, N, K) of the matrix products
_ROUNDS, _SECONDS = 5, 0.25  # of each measure, at least
GEMM_DTYPES = (torch.float32, torch.bfloat16)


def measure(threads: int) -> dict[str, float]:
    """Bytes per second of copy and read, operations per second of matrix products in each dtype; the best of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = _bandwidth()
        for dtype in GEMM_DTYPES:
            best[str(dtype).removeprefix("torch.")] = max(_gemm(*shape, dtype) for shape in _SHAPES)
        return best
    finally:
        torch.set_num_threads(before)


def _bandwidth() -> dict[str, float]:
    source, target = torch.ones(2, _BYTES // 4).unbind()
    copied = _shortest(lambda: target.copy_(source))
    return {"copy": 2 * _BYTES / copied, "read": _BYTES / _shortest(lambda: torch.dot(source, source))}


def _gemm(m: int, n: int, k: int, dtype: torch.dtype) -> float:
    a, b, out = (torch.ones(size, dtype=dtype) for size in ((m, k), (n, k), (m, n)))
    return 2 * m * n * k / _shortest(lambda: torch.mm(a, b.T, out=out))


def floor(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> float | None:
    """The least seconds that the row's bytes and flops take; None where neither is known, or not the dtype's rate."""
    parts = []
    if row["bytes"] is not None:
        parts.append(row["bytes"] / max(ceilings["copy"], ceilings["read"]))
    if row["flops"] is not None and row["dtype"] in ceilings:
        parts.append(row["flops"] / ceilings[row["dtype"]])
    return max(parts, default=None)


def best(*measured: Mapping[str, float]) -> dict[str, float]:
    """The greatest of each: a ceiling is what was reached at least once."""
    return {name: max(m[name] for m in measured) for name in measured[0]}


def _shortest(call: Callable[[], Any]) -> float:
    call()
    times: list[float] = []
    while len(times) < _ROUNDS or sum(times) < _SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
