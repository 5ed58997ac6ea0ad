"""The door to the native core: loads ``fastgpt._C``, gives it torch's thread pool, picks the instruction set."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

try:
    from fastgpt import _C
except ImportError as error:  # pragma: no cover - only in a broken installation
    raise ImportError(
        f"fastgpt's native core is missing or does not load ({error}). Build it with `pip install .` "
        "(in the source tree: `pip install -e .`)."
    ) from error

# What a kernel takes. The numbers are csrc/fastgpt.h's DType.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def pointer(tensor: torch.Tensor | None) -> int | None:
    """The address that a kernel reads or writes; None stays None (a null pointer)."""
    return None if tensor is None else tensor.data_ptr()


def with_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, just allocated, with huge pages asked for if it is large.

    malloc keeps no freed block of over 32 MiB, so such a tensor is new memory each time, and touching it in small pages
    takes longer than computing what goes into it.
    """
    if tensor.nbytes > 32 << 20 and tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def unsupported_dtype(*tensors: torch.Tensor | None) -> str | None:
    """Why the CPU kernels do not take these tensors' dtypes, or None if they do."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} (CPU kernels take float32, bfloat16, float16)"
    return None


def cuda_summary() -> str:
    """Whether this build holds CUDA code, for which architectures, and what GPU there is."""
    if not _C.cuda.compiled:
        return "left out (nvcc was not found when fastgpt was built, or FASTGPT_CUDA=off)"
    return f"compiled in for {_C.cuda.architectures}; {_C.cuda.describe()}"


def _use_torch_threads() -> bool:
    """Gives the core torch's own pool: two pools that spin against each other ruin small operators.

    False where this torch has no such entry points; the core's own threads then do the work.
    """
    (path,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
    try:
        library = ctypes.CDLL(str(path))
        loop, count = (
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
            for name in ("torch_parallel_for", "torch_get_num_threads")
        )
    except (OSError, AttributeError):
        _C.set_own_threads(torch.get_num_threads())
        return False
    _C.set_parallel_functions(loop, count)
    return True


def _choose_isa() -> None:
    """Obeys FASTGPT_CPU_ISA, and refuses a level that this machine lacks."""
    wanted = os.environ.get("FASTGPT_CPU_ISA")
    if not wanted or _C.cpu.set_isa(wanted):
        return
    levels = {name: (needs, supported) for name, needs, supported in _C.cpu.isas()}
    usable = ", ".join(name for name, (_, supported) in levels.items() if supported)
    if wanted in levels:
        raise ImportError(
            f"FASTGPT_CPU_ISA={wanted} needs {levels[wanted][0]}, which this machine lacks; it has: {usable}"
        )
    raise ImportError(f"FASTGPT_CPU_ISA={wanted!r} is not a level of this build; allowed here: {usable}")


torch_threads = _use_torch_threads()
_choose_isa()
