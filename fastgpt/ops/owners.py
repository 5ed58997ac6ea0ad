"""Who owns each operator on each device, and why: the one table. ``fastgpt.explain()`` prints it.

On a CUDA device of NVIDIA's the CUDA kernels own every operator, but for attention on the architectures whose matrix
instructions mma.sync does not reach. Where the owner is not in this build, or does not take a call's arguments, the
next of its row runs, and the reference comes last. On AMD's GPUs (ROCm) there are no CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])
_HALVES = (torch.float16, torch.bfloat16)


class Place(NamedTuple):
    """Where tensors are: a device type, and of a CUDA device the compute capability; (0, 0) where no GPU answers.

    ROCm's devices are of type "cuda" in torch, and "rocm" here.
    """

    device_type: str
    capability: tuple[int, int] = (0, 0)


class Owner(NamedTuple):
    backend: str
    reason: str


class Row(NamedTuple):
    """An operator's reasons. ``triton_first``: the major compute capabilities where Triton comes before CUDA, for
    16-bit types."""

    cpu: str
    cuda: str
    triton_first: tuple[int, ...] = ()


# Hopper (sm_90) has wgmma, data-centre Blackwell (sm_100) has tcgen05; the others, sm_120 too, have mma.sync alone.
_OWN_MATRIX_INSTRUCTIONS = (9, 10)

TABLE = {
    "adamw": Row(
        "all tensors in one call; the norm and clipping without writing gradients",
        "64 tensors a launch; the norm and clipping stay on the device",
    ),
    "attention": Row(
        "online softmax, never an L x S matrix; deterministic gradients",
        "tiles on tensor cores, every option fused; deterministic without workspace",
        _OWN_MATRIX_INSTRUCTIONS,
    ),
    "attention_varlen": Row(
        "attention's kernel, one sequence after the other: no padding is computed",
        "all sequences in one launch of attention's kernels, without padding",
        _OWN_MATRIX_INSTRUCTIONS,
    ),
    "attention_with_kvcache": Row(
        "attention's kernel, one sequence after the other; pages are gathered first",
        "keys split over blocks, pages read in place",
    ),
    "cross_entropy": Row(
        "the loss in one pass over the logits, the gradient in another",
        "one pass over the logits, one more for the gradient; nothing waits for the device",
    ),
    "embedding": Row(
        "token and position rows in one pass; sorted, deterministic backward",
        "token and position rows in one pass; sorted, deterministic backward",
    ),
    "gelu": Row(
        "vector exp in one pass, bias fused, saves only the input",
        "bias fused, its gradient deterministic; saves only the input",
    ),
    "layer_norm": Row(
        "one pass over the row from memory, deterministic weight gradients",
        "rows read once, into registers; deterministic weight gradients with them",
    ),
    "linear_cross_entropy": Row(
        "never more than 32 MiB of logits in memory",
        "never more than 256 MiB of logits in memory, the gradient in their place",
    ),
    "rms_norm": Row(
        "one pass over the row from memory, deterministic weight gradient",
        "rows read once, into registers; a deterministic weight gradient with them",
    ),
    "rotary": Row(
        "one pass through any strides; the transposition to (B, H, T, D) comes free",
        "one pass through any strides; the transposition to (B, H, T, D) comes free",
    ),
    "sample": Row(
        "thresholds by radix selection, no sort; the same token as the reference",
        "one launch, thresholds by selection, no sort; the same token as the CPU",
    ),
    "swiglu": Row(
        "one pass, reads slices of a fused projection in place, recomputes in backward",
        "one pass, slices of a fused projection read in place, recomputes in backward",
    ),
}

_MATRIX = (
    "Triton emits this GPU's own matrix instructions; CUDA's mma.sync reaches about 60 % of Hopper's rate and less of "
    "Blackwell's (predicted, not measured)"
)
_SECOND = "the same operator in Triton, compiled at its first call"
_AMD = "the CUDA kernels are NVIDIA's; Triton's compile for AMD (checked for gfx942, not run)"


def owners(name: str, place: Place, dtype: torch.dtype | None = None) -> tuple[Owner, ...]:
    """Who may run operator ``name``, the owner first; empty where only the reference can.

    Args:
        dtype: of the tensors, where it matters (attention).
    """
    row = TABLE[name]
    if place.device_type == "cpu":
        return (Owner("cpu", row.cpu),)
    if place.device_type == "rocm":
        return (Owner("triton", _AMD),)
    if place.device_type != "cuda":
        return ()
    if place.capability[0] in row.triton_first and dtype in _HALVES:
        return Owner("triton", _MATRIX), Owner("cuda", row.cuda)
    return Owner("cuda", row.cuda), Owner("triton", _SECOND)


# --- devices ---

_places: dict[int, Place] = {}


def place(device: torch.device) -> Place:
    """The place of a device. A GPU is asked once; under torch.compile the answer is a constant of the graph."""
    return Place(device.type) if device.type != "cuda" else _gpu(-1 if device.index is None else device.index)


def constant_when_compiled(function: _F) -> _F:
    """What torch.compiler.assume_constant_result does. That imports torch._dynamo, which takes longer than fastgpt."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _gpu(index: int) -> Place:
    if index in _places:
        return _places[index]
    if not torch.cuda.is_available():  # fake tensors
        return Place("cuda")
    if index < 0:
        index = torch.cuda.current_device()
    if index not in _places:
        amd = torch.version.hip is not None
        _places[index] = Place("rocm") if amd else Place("cuda", torch.cuda.get_device_capability(index))
    return _places[index]
