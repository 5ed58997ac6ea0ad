"""The door to the kernels: loads ``fastgpt._C``, gives it torch's thread pool, picks the instruction set.

An operator calls its kernels through one function for all backends that have any, ``_native(kernels, *arguments)``,
and ``backends`` makes each backend of it. ``kernels.<entry>(field=value, ...)`` runs a kernel of csrc/fastgpt.h. A
field that is a pointer there is a tensor here (or None), an array of pointers is a list of tensors:

- "cpu": ``fastgpt._C.cpu``;
- "cuda": ``fastgpt._C.cuda``, on torch's current stream, with workspace from torch's allocator;
- "triton": the function ``<entry>`` of kernels/<op>.py, with the same fields;
- "simt": the CUDA kernels on CPU tensors, by the emulator ``fastgpt._simt``, for tests and debugging (built with
  FASTGPT_SIMT=on); inside ``checked_simt()`` by ``fastgpt._simt_checked``, which looks for races and stray accesses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode


def _load_from(module: str, path: str) -> Any:
    """Loads the file ``path`` as the module fastgpt.``module``, in the place of this package's own."""
    spec = importlib.util.spec_from_file_location(f"fastgpt.{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


try:
    if path := os.environ.get("FASTGPT_C_LIBRARY"):  # another build of the core: `make sanitize` judges one that way
        _load_from("_C", path)
    from fastgpt import _C
except ImportError as error:  # pragma: no cover - only in a broken installation
    raise ImportError(
        f"fastgpt's native core is missing or does not load ({error}). Build it with `pip install .` "
        "(in the source tree: `pip install -e .`)."
    ) from error

# What a kernel takes. The numbers are csrc/fastgpt.h's DType.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The device type of the tensors that a backend takes. Triton's interpreter takes them on the CPU.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
DEVICE_TYPES = {"cpu": "cpu", "cuda": "cuda", "triton": "cpu" if _INTERPRETED else "cuda", "simt": "cpu"}


class Kernels(Protocol):
    """What ``_native`` functions get: every kernel of one backend as an attribute."""

    def __getattr__(self, entry: str) -> Any: ...


def with_huge_pages(tensor: torch.Tensor, at_least: int = 32 << 20) -> torch.Tensor:
    """``tensor``, just allocated, with huge pages asked for if it has more bytes than ``at_least``.

    malloc keeps no freed block of over 32 MiB, so such a tensor is new memory each time, and touching it in small pages
    takes longer than computing what goes into it.
    """
    if tensor.nbytes > at_least and tensor.device.type == "cpu":
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def unsupported_dtype(*tensors: torch.Tensor | None) -> str | None:
    """Why the native kernels do not take these tensors' dtypes, or None if they do."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype} (native kernels take float32, bfloat16, float16)"
    return None


# --- backends ---


def _optional(name: str) -> Any:
    """A module of this package that a build may leave out, or None.

    FASTGPT_SIMT_LIBRARY and FASTGPT_SIMT_CHECKED_LIBRARY name another build of the emulator's modules to load in their
    place: the mutation run judges changed kernels that way.
    """
    if path := os.environ.get(f"FASTGPT{name.upper()}_LIBRARY"):
        return _load_from(name, path)
    try:
        return importlib.import_module(f"fastgpt.{name}")
    except ModuleNotFoundError:
        return None


_simt = _optional("_simt")
_simt_checked = _optional("_simt_checked")
_NO_CUDA = "CUDA is not in this build, which needs nvcc"
_NO_EMULATOR = "the emulator is not in this build: build with FASTGPT_SIMT=on"
NO_TRITON = "" if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton (Linux)"
_TRITON_KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# FASTGPT_TRITON_KERNELS names another folder to load the Triton kernels from: the mutation run judges changed ones so.
if path := os.environ.get("FASTGPT_TRITON_KERNELS"):
    _TRITON_KERNELS = Path(path)
    importlib.import_module("fastgpt.kernels").__path__ = [path]

# The kernels of operators that call others than <op>, <op>_forward and <op>_backward.
_KERNELS_OF = {
    "adamw": ("adamw", "grad_norm"),
    "attention_varlen": ("attention_forward", "attention_backward"),
    "attention_with_kvcache": ("attention_forward",),
    "linear_cross_entropy": ("cross_entropy_forward", "cross_entropy_backward"),
}


def _entries(op: str) -> Sequence[str]:
    return _KERNELS_OF.get(op) or [n for n in (op, f"{op}_forward", f"{op}_backward") if hasattr(_C.cpu, n)]


def _triton_module(entry: str) -> str:
    """The file of kernels/ that an entry is in."""
    return "adamw" if entry == "grad_norm" else entry.removesuffix("_forward").removesuffix("_backward")


def missing(backend: str, op: str) -> str | None:
    """Why operator ``op`` cannot run on the native ``backend`` in this build, or None if it can."""
    if backend == "cuda" and not _C.cuda.compiled:
        return _NO_CUDA
    if backend == "simt" and _simt is None:
        return _NO_EMULATOR
    if backend == "triton":
        if NO_TRITON:
            return NO_TRITON
        absent = sorted({m for m in map(_triton_module, _entries(op)) if not (_TRITON_KERNELS / f"{m}.py").exists()})
        return f"there is no Triton kernel {' or '.join(absent)}" if absent else None
    module = {"cpu": _C.cpu, "cuda": _C.cuda, "simt": _simt}[backend]
    absent = [name for name in _entries(op) if not hasattr(module, name)]
    return f"there is no CUDA kernel {' or '.join(absent)}" if absent else None


def has_kernel(backend: str, op: str) -> bool:
    """Whether this build holds every kernel that operator ``op`` needs on the native ``backend``."""
    return missing(backend, op) is None


class _DeviceKernels:
    """The kernels of ``module`` with a stream and an allocator of workspace: each call gives them to the kernel.

    A workspace lives until the call returns. On a GPU the kernel may still run then; torch's allocator hands the memory
    out again only to work that comes later in the same stream.
    """

    def __init__(self, backend: str, module: Any, device: str, stream: Callable[[], int]) -> None:
        self._backend, self._module, self._device, self._stream = backend, module, device, stream

    def __getattr__(self, entry: str) -> Callable[..., None]:
        kernel = getattr(self._module, entry, None)
        if kernel is None:
            raise NotImplementedError(f"{entry}: this build has no kernel of that name for backend={self._backend!r}")

        def call(**fields: Any) -> None:
            workspaces = []

            def allocate(bytes: int) -> int:
                workspaces.append(torch.empty(bytes, dtype=torch.uint8, device=self._device))
                return workspaces[-1].data_ptr()

            kernel(**fields, stream=self._stream(), allocate=allocate)

        setattr(self, entry, call)  # __getattr__ is not asked again
        return call


class _TritonKernels:
    """The kernels of the folder kernels/. Triton is imported, and a kernel compiled, when it is first called."""

    def __getattr__(self, entry: str) -> Callable[..., None]:
        try:
            module = importlib.import_module(f"fastgpt.kernels.{_triton_module(entry)}")
        except ModuleNotFoundError as error:
            if NO_TRITON or not (error.name or "").startswith("fastgpt.kernels"):
                raise NotImplementedError(f"backend='triton': {NO_TRITON or error}") from error
            raise NotImplementedError(f"{entry}: there is no Triton kernel of that name") from error
        setattr(self, entry, getattr(module, entry))  # __getattr__ is not asked again
        return getattr(module, entry)


_triton_kernels = _TritonKernels()
_cuda_kernels = _DeviceKernels("cuda", _C.cuda, "cuda", lambda: torch.cuda.current_stream().cuda_stream)
_simt_kernels = _DeviceKernels("simt", _simt, "cpu", lambda: 0)
_checked_kernels = _DeviceKernels("simt", _simt_checked, "cpu", lambda: 0)
_checking = False


def _device(args: Sequence[Any]) -> torch.device:
    """Where an operator's tensors are."""
    first: torch.Tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    return first.device


def _run_cuda(function: Callable[..., Any], *args: Any) -> Any:
    if not _C.cuda.compiled:
        raise NotImplementedError(f"backend='cuda': {_NO_CUDA}")
    with torch.cuda.device(_device(args)):
        return function(_cuda_kernels, *args)


def _run_triton(function: Callable[..., Any], *args: Any) -> Any:
    device = _device(args)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return function(_triton_kernels, *args)


def _run_simt(function: Callable[..., Any], *args: Any) -> Any:
    if _simt is None:
        raise NotImplementedError(f"backend='simt': {_NO_EMULATOR}")
    if not _checking:
        return function(_simt_kernels, *args)
    try:
        with _RegisterPointers():
            return function(_checked_kernels, *args)
    finally:
        _simt_checked.clear_regions()


def asynchronous(kernels: Kernels) -> bool:
    """Whether a kernel may still run when its call returns. What it finds in the data then raises no error: it shows in
    the result, as NaN. So too on the emulator, which does what CUDA does."""
    return kernels is not _C.cpu


def backends(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The native backends of an operator, for ``registry.define``.

    Args:
        function: called with the backend's kernels and the schema's arguments, of which the first is a tensor or a
            list of tensors.
    """
    return {
        "cpu": functools.partial(function, _C.cpu),
        "cuda": functools.partial(_run_cuda, function),
        "triton": functools.partial(_run_triton, function),
        "simt": functools.partial(_run_simt, function),
    }


class _RegisterPointers(TorchFunctionMode):
    """Tells the checked emulator about the memory of every tensor whose address is taken: all that a kernel may touch.

    A mode of torch's, so that it costs nothing when nobody checks.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.data_ptr:
            _simt_checked.register_region(result, _spanned_bytes(args[0]))
        return result


def _spanned_bytes(tensor: torch.Tensor) -> int:
    """From the first to the last element of a view, in bytes."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextlib.contextmanager
def checked_simt() -> Iterator[None]:
    """Inside the block backend "simt" runs on the checking emulator, which knows the extent of every tensor."""
    global _checking
    if _simt_checked is None:
        raise NotImplementedError(f"checked_simt: {_NO_EMULATOR}")
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Inside the block backend "triton" takes CPU tensors: for a runner of Triton kernels that needs no GPU."""
    before, DEVICE_TYPES["triton"] = DEVICE_TYPES["triton"], "cpu"
    try:
        yield
    finally:
        DEVICE_TYPES["triton"] = before


# --- start ---


def cuda_summary() -> str:
    """Whether this build holds CUDA code, for which architectures, and what GPU there is."""
    if not _C.cuda.compiled:
        return "left out (nvcc was not found when fastgpt was built, or FASTGPT_CUDA=off)"
    return f"compiled in for {_C.cuda.architectures}; {_C.cuda.describe()}"


def simt_summary() -> str:
    """Whether this build holds the emulator of CUDA kernels."""
    return _NO_EMULATOR if _simt is None else "the emulator is in this build"


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
