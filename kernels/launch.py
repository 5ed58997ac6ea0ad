"""How the kernels of this folder are launched: the one door to running, recording and tuning them.

A kernel has one configuration (block sizes, warps, pipeline stages), or a few per architecture, the preferred one
first. Where there are several, the first call of a shape class times them on the GPU that is there, says so, and keeps
the answer in a file. Block sizes decide the order of sums, so FASTGPT_DETERMINISTIC=1 and
torch.use_deterministic_algorithms(True) always take the first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

# Called with the target; the configurations to choose from, the preferred one first.
Configs = Callable[[GPUTarget], Sequence[triton.Config]]
Grid = Callable[[dict[str, Any]], tuple[int, ...]] | tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One call of ``launch``, for those who compile kernels without running them (``recording``)."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    configs: Configs
    options: dict[str, Any] = field(default_factory=dict)

    def constants_with(self, config: triton.Config) -> dict[str, Any]:
        """Every tl.constexpr argument."""
        return {**self.constants, **config.kwargs}

    def args_with(self, config: triton.Config) -> tuple[Any, ...]:
        """The other arguments; those that depend on the configuration as it has them."""
        chosen = self.constants_with(config)
        return tuple(arg(chosen) if callable(arg) else arg for arg in self.args)


_records: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block launches are noted in the list, and nothing runs."""
    global _records
    before, _records = _records, []
    try:
        yield _records
    finally:
        _records = before


def one_config(*, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> Configs:
    """The only configuration, on every architecture."""
    config = triton.Config(constants, num_warps=num_warps, num_stages=num_stages)
    return lambda target: (config,)


def launch(
    kernel: Any,
    grid: Grid,
    *args: Any,
    configs: Configs,
    shape_class: tuple[Any, ...] = (),
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Runs ``kernel`` on a grid.

    Args:
        kernel: a function under @triton.jit.
        grid: its extents, or a function of the constants (those of the configuration included). Nothing runs if an
            extent is zero.
        args: the arguments that are not tl.constexpr, in order. Tensors stand for their first element; None for a null
            pointer, which the kernel sees as a constant. A function is called with the constants (those of the
            configuration included) and gives the argument: a descriptor of tiles depends on their size.
        configs: what to choose from. Where that is more than one, the kernel runs many times over while they are timed,
            so it must not read what it writes.
        shape_class: what the best configuration depends on, besides the kernel and the architecture: a power of two of
            a length, a dtype, a flag. Never the batch: its rows must not change each other's bits.
        fp_fusion: whether a * b + c may become one instruction; False where bits must equal another backend's.
        constants: the tl.constexpr arguments that are not the configuration's.
    """
    call = Launch(kernel, args, constants, configs, {"enable_fp_fusion": fp_fusion})
    if _records is not None:
        _records.append(call)
        return
    if not callable(grid) and 0 in grid:
        return
    run = functools.partial(_run, call, grid)
    choices = configs(_target())
    run(choices[0] if len(choices) == 1 else _choose(kernel, choices, shape_class, run))


def _run(call: Launch, grid: Grid, config: triton.Config) -> None:
    chosen = call.constants_with(config)
    extents = grid(chosen) if callable(grid) else grid
    if 0 not in extents:
        named = {**chosen, "num_warps": config.num_warps, "num_stages": config.num_stages, **call.options}
        call.kernel[extents](*call.args_with(config), **named)


_targets: dict[tuple[Any, int], GPUTarget] = {}


def _target() -> GPUTarget:
    """Of the current device, which is asked once."""
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 80, 32)
    driver = triton.runtime.driver.active
    key = driver, driver.get_current_device()
    if key not in _targets:
        _targets[key] = driver.get_current_target()
    return _targets[key]


# --- tuning ---


# What was decided in this process: by kernel, shape class and device.
_decided: dict[tuple[Any, tuple[Any, ...], int], triton.Config] = {}


def _choose(
    kernel: Any, choices: Sequence[triton.Config], shape_class: tuple[Any, ...], run: Callable[[triton.Config], None]
) -> triton.Config:
    if deterministic() or not torch.cuda.is_available():
        return choices[0]
    device = torch.cuda.current_device()
    known = kernel, shape_class, device
    if known not in _decided:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed now
            return choices[0]
        _decided[known] = _remembered_or_fastest(kernel, choices, shape_class, device, run)
    return _decided[known]


def deterministic() -> bool:
    """Whether the same bits are wanted in every run, whatever was timed."""
    wanted = os.environ.get("FASTGPT_DETERMINISTIC", "0") not in ("", "0")
    return wanted or torch.are_deterministic_algorithms_enabled()


def _remembered_or_fastest(
    kernel: Any,
    choices: Sequence[triton.Config],
    shape_class: tuple[Any, ...],
    device: int,
    run: Callable[[triton.Config], None],
) -> triton.Config:
    names = [str(config) for config in choices]
    key = f"{kernel.__name__} {' '.join(map(str, shape_class))}".strip()
    file = _file(device, kernel)
    remembered = _load(file).get(key)
    if remembered in names:
        return choices[names.index(remembered)]
    print(f"fastgpt: timing {len(choices)} configurations of {key}, once (a few seconds)", file=sys.stderr, flush=True)
    times = [_seconds(run, config) for config in choices]
    fastest = times.index(min(times))
    if times[fastest] < float("inf"):  # else the first will say what it lacks
        _save(file, {**_load(file), key: names[fastest]})  # read anew: another process may have added to it
    return choices[fastest]


def _seconds(run: Callable[[triton.Config], None], config: triton.Config) -> float:
    try:
        return float(triton.testing.do_bench(functools.partial(run, config), warmup=5, rep=20))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _file(device: int, kernel: Any) -> Path:
    """Where the answers for this GPU, this Triton and this source (with what it calls) are kept."""
    root = os.environ.get("FASTGPT_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastgpt")
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return Path(root).expanduser() / "triton" / f"{name}-{triton.__version__}-{kernel.cache_key[:16]}.json"


def _load(file: Path) -> dict[str, str]:
    """Kernel and shape class -> configuration. A file that is not as it should be is as good as none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _save(file: Path, tuned: dict[str, str]) -> None:
    """Written aside and moved into place, so that another process never reads half a file. A cache that cannot be
    written is timed again next time."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(tuned, indent=1))
        part.replace(file)
