"""Timing side by side: ours and its peers take turns, A B C A B C ..., so that a drifting machine hits all alike.

A benchmark measures and never asserts. What counts is the ratio of medians; absolute times belong to one machine on
one day. ``@pytest.mark.quick(work="forward", dtype=[a, b])`` names the cases of a test that ``fastgpt bench --quick``
runs (parameters by value or list of values; several marks add up; without arguments: every case), and
``@pytest.mark.long(...)`` those that run only with ``--long``.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import memory
from fastgpt.ops import owners, registry

ROUNDS = (3, 200)  # fewest and most
LONG = 1.0  # seconds of one round after which its first, cold, measure is good enough to choose the number of rounds

Call = Callable[[], Any]


@dataclass
class Settings:
    """What a run asks of every case: conftest.py sets it."""

    seconds: float = 1.5  # of measuring, all calls together
    quick: bool = False
    long: bool = False


settings = Settings()


@dataclass(frozen=True)
class Missing:
    """A peer that cannot run here, and why: the results name it."""

    why: str = "not installed"


def optional(module: str, function: str) -> Callable[..., Any] | Missing:
    """A function of a package that may not be there: a peer."""
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError:
        return Missing("not installed")
    except (ImportError, AttributeError) as error:
        return Missing(f"{type(error).__name__}: {error}")


def compiled(function: Callable[..., Any], *, long: bool = False) -> Callable[..., Any] | Missing:
    """``function`` under torch.compile with its shapes compiled in: a peer. A quick run has no time to compile, and
    only a long one compiles what is marked so here."""
    if settings.quick or (long and not settings.long):
        return Missing("needs --long" if long else "left out of a quick run")
    torch.compiler.reset()  # or the cases before this one would count against its limit of recompilations
    return torch.compile(function, dynamic=False)


def sides(work: str, op: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Call, dict[str, Call | Missing]]:
    """Ours and its peers, torch eager and torch.compile, for an operator; ``work`` is forward or forward_backward.

    The forward pass alone is compiled in a long run only: compiling takes seconds a case.
    """
    make = {"forward": forward, "forward_backward": forward_backward}[work]
    plain = functools.partial(op, backend="torch")
    peers = {
        "torch": make(plain, *inputs, **options),
        "torch.compile": make(compiled(plain, long=work == "forward"), *inputs, **options),
    }
    return make(functools.partial(op, backend="fused"), *inputs, **options), peers


def versus(
    benchmark: Any,
    ours: Call,
    peers: dict[str, Call | Missing | None],
    *,
    bytes: float | None = None,
    flops: float | None = None,
    threads: int = 1,
    shape: str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    scale: tuple[str, int] | None = None,
) -> None:
    """Times ``ours`` against every peer in interleaved rounds and records what report.py makes a row of.

    Args:
        benchmark: pytest-benchmark's fixture.
        peers: name -> the same work done by somebody else; ``Missing`` or None where it cannot run here. A peer that
            raises is recorded as missing too, with its error.
        bytes, flops: what must move and what must be computed, for the floor and the roofline. In elementwise work a
            transcendental function counts as one operation.
        threads: torch's thread count meanwhile.
        shape, dtype: for the row; by default those of the first tensor given to ``forward`` or ``forward_backward``
            (a parameter of the test that is a dtype goes first).
        backend: who runs ours; by default the owner of the operator that the suite is named after.
        scale: (variable, value) of a case that belongs to a curve of cost against that variable.
    """
    absent = {name: call or Missing() for name, call in peers.items() if not callable(call)}
    calls = {name: call for name, call in peers.items() if callable(call)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fell_back = registry.fallbacks()
        once = [_seconds(ours)]  # a warm-up
        fell_back = {key: n for key, n in registry.fallbacks().items() if n > fell_back.get(key, 0)}
        for name, call in list(calls.items()):
            try:
                once.append(_seconds(call))
            except Exception as error:  # it stays in the table, with the reason
                absent[name] = Missing(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200])
                del calls[name]
        peaks = {name: memory.peak(call) for name, call in {"": ours, **calls}.items()}
        cost = sum(once)
        if cost < LONG or len(calls) < len(peers):  # else it was warm-up enough
            cost = min(cost, sum(_seconds(call) for call in (ours, *calls.values())))
        rounds = int(min(max(settings.seconds / cost, ROUNDS[0]), ROUNDS[1]))
        times: dict[str, list[float]] = {name: [] for name in calls}

        def peers_take_their_turn() -> None:
            for name, call in calls.items():
                times[name].append(_seconds(call))

        benchmark.pedantic(ours, setup=peers_take_their_turn, rounds=rounds, iterations=1)
    finally:
        torch.set_num_threads(before)
    if benchmark.stats is None:  # --benchmark-disable: everything ran, nothing was timed
        return
    mine = list(benchmark.stats.stats.data)
    given = next((p for p in (getattr(benchmark, "params", None) or {}).values() if isinstance(p, torch.dtype)), None)
    dtype = dtype or given or getattr(ours, "dtype", None)
    suite = benchmark.fullname.split("::")[0].rsplit("/")[-1].removesuffix(".py")
    if backend is None and suite in registry.operators():
        backend = registry.owner_on(suite, owners.place(torch.device("cpu")), dtype).backend
    if fell_back:
        backend = "reference: " + "; ".join(why for _, why in fell_back)
    benchmark.extra_info.update(
        suite=suite,
        shape=shape or getattr(ours, "shape", None),
        dtype=str(dtype).removeprefix("torch.") if dtype else None,
        backend=backend or "fused",
        threads=threads,
        bytes=bytes,
        flops=flops,
        memory=peaks[""],
        spread=spread(mine),
        peers={
            name: {
                "seconds": statistics.median(values),
                "spread": spread(values),
                "ratio": statistics.median(values) / statistics.median(mine),
                "interval": interval(values, mine),
                "memory": peaks[name],
            }
            for name, values in times.items()
        },
        missing={name: absence.why for name, absence in absent.items()},
        scale=scale,
    )


def spread(seconds: Sequence[float]) -> float:
    """The rounds' robust standard deviation (1.48 median absolute deviations) over their median."""
    middle = statistics.median(seconds)
    return 1.4826 * statistics.median(abs(s - middle) for s in seconds) / middle


def interval(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Where 95 % of the ratios of medians lie when the rounds, in pairs, are drawn again with replacement."""
    pairs = np.array([above, below])
    draws = np.random.default_rng(0).integers(pairs.shape[1], size=(1000, pairs.shape[1]))
    medians = np.median(pairs[:, draws], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return float(low), float(high)


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
    for _ in range(int(min(max(settings.seconds / once, ROUNDS[0]), ROUNDS[1]))):
        for name, call in calls.items():
            times[name].append(timer(call))
    return {name: statistics.median(values) for name, values in times.items()}


def forward(function: Callable[..., Any] | Missing, *inputs: Any, **options: Any) -> Call | Missing:
    """The forward pass alone, without recording anything for a backward. A missing function stays missing."""
    if isinstance(function, Missing):
        return function

    def call() -> Any:
        with torch.no_grad():
            return function(*inputs, **options)

    return _described(call, inputs)


def forward_backward(
    function: Callable[..., Any] | Missing, *inputs: Any, upstream: Sequence[Tensor] | None = None, **options: Any
) -> Call | Missing:
    """Forward, then the gradient of every input that wants one; ``upstream`` is the gradient of each output (by
    default random, and drawn by the first call)."""
    if isinstance(function, Missing):
        return function
    leaves = [t for t in (*inputs, *options.values()) if isinstance(t, Tensor) and t.requires_grad]
    gradients = list(upstream) if upstream is not None else []

    def call() -> Any:
        result = function(*inputs, **options)
        results = (result,) if isinstance(result, Tensor) else result
        if not gradients:
            gradients.extend(torch.randn_like(r) for r in results)
        return torch.autograd.grad(results, leaves, gradients)

    return _described(call, inputs)


def _described(call: Any, inputs: Sequence[Any]) -> Call:
    """``call``, knowing shape and dtype of its first floating-point tensor."""
    first = next((t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is not None:
        call.shape, call.dtype = " x ".join(map(str, first.shape)), first.dtype
    return call
