"""Timing side by side: ours and its peers take turns, A B C A B C ..., so that a drifting machine hits all alike.

A benchmark measures and never asserts. What counts is the ratio of medians; absolute times belong to one machine on
one day.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SECONDS_PER_CASE = 1.5
ROUNDS = (3, 200)  # fewest and most

Call = Callable[[], Any]


def versus(
    benchmark: Any,
    ours: Call,
    peers: dict[str, Call],
    *,
    bytes: float | None = None,
    flops: float | None = None,
    threads: int = 1,
) -> None:
    """Times ``ours`` against every peer in interleaved rounds and records medians and ratios for the results table.

    Args:
        benchmark: pytest-benchmark's fixture.
        peers: name -> the same work done by somebody else.
        bytes, flops: what must move and what must be computed, for GB/s and GFLOP/s.
        threads: torch's thread count meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        once = sum(_seconds(call) for call in (ours, *peers.values()))  # also the warm-up
        once = min(once, sum(_seconds(call) for call in (ours, *peers.values())))
        rounds = int(min(max(SECONDS_PER_CASE / once, ROUNDS[0]), ROUNDS[1]))
        times: dict[str, list[float]] = {name: [] for name in peers}

        def peers_take_their_turn() -> None:
            for name, call in peers.items():
                times[name].append(_seconds(call))

        benchmark.pedantic(ours, setup=peers_take_their_turn, rounds=rounds, iterations=1)
    finally:
        torch.set_num_threads(before)
    mine = benchmark.stats.stats.median
    info = benchmark.extra_info
    info["threads"] = threads
    info["peers"] = {name: statistics.median(values) for name, values in times.items()}
    info["ratios"] = {name: seconds / mine for name, seconds in info["peers"].items()}
    if bytes is not None:
        info["GB/s"] = bytes / mine / 1e9
    if flops is not None:
        info["GFLOP/s"] = flops / mine / 1e9


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class GpuTimer:
    """Seconds that a call takes by the GPU's own clock (CUDA events), with its L2 cache overwritten before.

    While the GPU overwrites 256 MB, the host gets ahead of it, so that the time holds no waiting for the host.
    """

    def __init__(self) -> None:
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._memory = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call) -> float:
        self._memory.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def interleaved(calls: dict[str, Call], timer: Callable[[Call], float] = _seconds) -> dict[str, float]:
    """The median seconds of each call; they take turns, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timer(call)
    once = sum(timer(call) for call in calls.values())
    for _ in range(int(min(max(SECONDS_PER_CASE / once, ROUNDS[0]), ROUNDS[1]))):
        for name, call in calls.items():
            times[name].append(timer(call))
    return {name: statistics.median(values) for name, values in times.items()}


def forward(function: Callable[..., Any], *inputs: Any, **options: Any) -> Call:
    """The forward pass alone, without recording anything for a backward."""

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs, **options)

    return call


def forward_backward(
    function: Callable[..., Any], *inputs: Any, upstream: Sequence[Tensor] | None = None, **options: Any
) -> Call:
    """Forward, then the gradient of every input that wants one; ``upstream`` is the gradient of each output."""
    leaves = [t for t in (*inputs, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    with torch.no_grad():
        result = function(*inputs, **options)
    results = (result,) if isinstance(result, Tensor) else result
    gradients = list(upstream) if upstream is not None else [torch.randn_like(r) for r in results]

    def call() -> Any:
        result = function(*inputs, **options)
        return torch.autograd.grad((result,) if isinstance(result, Tensor) else result, leaves, gradients)

    return call
