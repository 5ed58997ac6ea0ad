"""Predicted floor times: what no kernel for the same work can beat on a GPU, from bytes, operations and data sheets.

A prediction is a bound, not a measurement: the longest of the time to move the bytes at the memory's full rate, the
time of the tensor cores, of the FP32 pipes and of the special-function units, each at its peak. FORMULAS counts, per
operator, the bytes that must move (every input read once, every output written once) and the operations that must run.
``fastgpt predict`` prints the tables, and writes docs/predictions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fastgpt.gpu.budget import Budget, Limits
from fastgpt.gpu.occupancy import ARCHITECTURES

HALF = 2  # bytes of a bfloat16
WORD = 4  # bytes of a float32


@dataclass(frozen=True)
class Device:
    """Peak rates by its data sheet: bytes/s; bf16 tensor-core (dense, float32 sums) and float32 flop/s; exponentials/s
    (16 per SM and clock)."""

    name: str
    architecture: int
    bandwidth: float
    tensor: float
    vector: float
    special: float


DEVICES = (
    Device("A100 80GB SXM", 80, 2039e9, 312e12, 19.5e12, 108 * 16 * 1.41e9),
    Device("H100 SXM", 90, 3350e9, 989e12, 67e12, 132 * 16 * 1.83e9),
    Device("RTX 4090", 89, 1008e9, 165e12, 82.6e12, 128 * 16 * 2.52e9),
)


@dataclass(frozen=True)
class Shape:
    """One training step or decoding step: B sequences of T tokens, H heads and KV key/value heads of D, width C = H D,
    feed-forward width F, vocabulary V, P parameters, S cached keys when decoding."""

    name: str
    B: int
    T: int
    H: int
    KV: int
    D: int
    F: int
    V: int
    P: int
    S: int

    @property
    def C(self) -> int:
        return self.H * self.D

    @property
    def N(self) -> int:
        return self.B * self.T

    @property
    def pairs(self) -> int:
        """(query, key) pairs of causal attention, over all heads."""
        return self.B * self.H * self.T * (self.T + 1) // 2


SHAPES = (
    Shape("GPT-2 124M, 16 x 1024 tokens", B=16, T=1024, H=12, KV=12, D=64, F=3072, V=50257, P=124_439_808, S=1024),
    Shape("Llama-3 8B, 2 x 4096 tokens", B=2, T=4096, H=32, KV=8, D=128, F=14336, V=128256, P=8_030_261_248, S=4096),
)


@dataclass(frozen=True)
class Work:
    """Bytes and operations: tensor-core flops, float32 flops, exponentials (or tanh)."""

    bytes: float
    tensor: float = 0
    vector: float = 0
    special: float = 0


@dataclass(frozen=True)
class Formula:
    """``kernel``: a shell pattern, in which {D} stands for the head dim, of the kernel that does most of the work."""

    work: str
    kernel: str
    count: Callable[[Shape], Work]


# Elements are bfloat16 (2 bytes); statistics, log-sum-exp and optimizer state are float32.
FORMULAS = (
    Formula(
        "attention forward, causal",
        "attention_forward_kernel<bf16, {D}, true>",
        lambda s: Work(
            bytes=HALF * 2 * s.B * s.T * (s.H + s.KV) * s.D + WORD * s.B * s.H * s.T,
            tensor=4 * s.pairs * s.D,
            vector=4 * s.pairs,
            special=s.pairs,
        ),
    ),
    Formula(
        "attention backward, causal",
        "attention_backward_kernel<Shape<bf16, {D}, *",
        lambda s: Work(  # reads Q, K, V, out, dout; writes dQ, dK, dV; five products
            bytes=HALF * s.B * s.T * (4 * s.H + 4 * s.KV) * s.D + WORD * s.B * s.H * s.T,
            tensor=10 * s.pairs * s.D,
            vector=5 * s.pairs,
            special=s.pairs,
        ),
    ),
    Formula(
        "attention, one query a sequence, S cached keys",
        "attention_decode_kernel<bf16, {D}*",
        lambda s: Work(
            bytes=HALF * s.B * (2 * s.H + 2 * s.KV * s.S) * s.D,
            tensor=4 * s.B * s.H * s.S * s.D,
            special=s.B * s.H * s.S,
        ),
    ),
    Formula(
        "layer_norm forward, + residual",
        "norm_forward_kernel<true, bf16, true, *",
        lambda s: Work(bytes=HALF * 4 * s.N * s.C + 2 * WORD * s.N, vector=8 * s.N * s.C),
    ),
    Formula(
        "layer_norm backward, + residual",
        "norm_backward_kernel<true, bf16, true, *",
        lambda s: Work(bytes=HALF * 4 * s.N * s.C + 2 * WORD * s.N, vector=14 * s.N * s.C),
    ),
    Formula(
        "rms_norm forward, + residual",
        "norm_forward_kernel<false, bf16, true, *",
        lambda s: Work(bytes=HALF * 4 * s.N * s.C + WORD * s.N, vector=6 * s.N * s.C),
    ),
    Formula(
        "rms_norm backward, + residual",
        "norm_backward_kernel<false, bf16, true, *",
        lambda s: Work(bytes=HALF * 4 * s.N * s.C + WORD * s.N, vector=11 * s.N * s.C),
    ),
    Formula(
        "gelu forward (tanh)",
        "gelu_forward_kernel<bf16, true*",
        lambda s: Work(bytes=HALF * 2 * s.N * s.F, vector=10 * s.N * s.F, special=2 * s.N * s.F),
    ),
    Formula(
        "gelu backward (tanh)",
        "gelu_backward_kernel<bf16, true*",
        lambda s: Work(bytes=HALF * 3 * s.N * s.F, vector=20 * s.N * s.F, special=2 * s.N * s.F),
    ),
    Formula(
        "swiglu forward",
        "swiglu_forward_kernel<bf16, true*",
        lambda s: Work(bytes=HALF * 3 * s.N * s.F, vector=5 * s.N * s.F, special=2 * s.N * s.F),
    ),
    Formula(
        "swiglu backward",
        "swiglu_backward_kernel<bf16, true*",
        lambda s: Work(bytes=HALF * 5 * s.N * s.F, vector=10 * s.N * s.F, special=2 * s.N * s.F),
    ),
    Formula(
        "rotary of q and k",
        "rotary_kernel<bf16*",
        lambda s: Work(
            bytes=HALF * 2 * s.N * (s.H + s.KV) * s.D + WORD * s.T * s.D, vector=3 * s.N * (s.H + s.KV) * s.D
        ),
    ),
    Formula(
        "embedding forward",
        "embedding_forward_kernel<bf16*",
        lambda s: Work(bytes=HALF * 2 * s.N * s.C + 8 * s.N),
    ),
    Formula(
        "embedding backward",
        "embedding_rows_kernel<bf16*",
        lambda s: Work(bytes=HALF * (s.N + s.V) * s.C + 8 * s.N, vector=s.N * s.C),
    ),
    Formula(
        "cross_entropy forward and gradient, in place",
        "cross_entropy_forward_kernel<bf16*",
        lambda s: Work(bytes=HALF * 2 * s.N * s.V + 8 * s.N, vector=6 * s.N * s.V, special=2 * s.N * s.V),
    ),
    Formula(
        "sample, one token a sequence",
        "sample*<bf16*",
        # A maximum first, then a weight (its exponential is a polynomial, so that every backend has the same bits).
        lambda s: Work(bytes=HALF * s.B * s.V, vector=(6 + 18) * s.B * s.V),
    ),
    Formula(
        "adamw, all parameters, with float32 masters",
        "adamw_kernel*",
        lambda s: Work(bytes=(3 * HALF + 6 * WORD) * s.P, vector=15 * s.P, special=2 * s.P),
    ),
)


def floor(work: Work, device: Device) -> tuple[float, str]:
    """Seconds that the work takes at least, and what takes them."""
    times = {
        "memory": work.bytes / device.bandwidth,
        "tensor cores": work.tensor / device.tensor,
        "FP32": work.vector / device.vector,
        "exponentials": work.special / device.special,
    }
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _amount(value: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value / 1e3:.3g} k{unit}" if value else "-"


def _limits(pattern: str, budget: Budget) -> Limits | None:
    """Of the first kernel, in the file's order, that fits the pattern."""
    return next((limits for name, limits in budget.kernels.items() if fnmatchcase(name, pattern)), None)


def _occupancy(limits: Limits | None, device: Device) -> str:
    if limits is None or device.architecture not in limits.blocks:
        return "-"
    warps = -(-limits.threads // 32)
    return f"{limits.blocks[device.architecture] * warps * 32 / ARCHITECTURES[device.architecture].threads:.0%}"


def _table(shape: Shape, devices: Sequence[Device], budget: Budget) -> list[str]:
    head = ["work", "bytes", "flops"] + [f"{d.name}: floor, bound, occupancy" for d in devices]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head))]
    for formula in FORMULAS:
        work = formula.count(shape)
        limits = _limits(formula.kernel.replace("{D}", str(shape.D)), budget)
        cells = [formula.work, _amount(work.bytes, "B"), _amount(work.tensor + work.vector, "F")]
        for device in devices:
            seconds, bound = floor(work, device)
            cells.append(f"{_duration(seconds)}, {bound}, {_occupancy(limits, device)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def document(budget: Budget) -> str:
    """The whole of docs/predictions.md."""
    lines = [
        "# Predicted floor times",
        "",
        "**Predicted, not measured**: no GPU was used. Written by `fastgpt predict --output docs/predictions.md`; the",
        "formulas are in fastgpt/gpu/predictions.py.",
        "",
        "A floor is the time that no kernel for the same work can beat: the longest of moving the bytes at the memory",
        "rate (every input read once, every output written once), and of the tensor cores, the FP32 pipes and the",
        "special-function units (exponentials) at their peak. The bound says which of them it is. Where working sets",
        "fit the L2 cache, a repeated call may beat the memory floor. Occupancy is the share of an SM's threads that",
        "the blocks of the compiled kernel can fill (csrc/cuda/budget.toml); a dash: the budget has no such kernel.",
        "",
        "Elements are bfloat16; statistics and optimizer state float32. Our attention backward computes seven products",
        "of queries and keys where the floor counts five: it needs no atomics, so that its results never vary.",
        "",
        "| device | architecture | memory | bf16 tensor cores | FP32 | exponentials |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {d.name} | {ARCHITECTURES[d.architecture].name} | {d.bandwidth / 1e9:.0f} GB/s "
        f"| {d.tensor / 1e12:.0f} TF/s | {d.vector / 1e12:.1f} TF/s | {d.special / 1e12:.2f} T/s |"
        for d in DEVICES
    ]
    for shape in SHAPES:
        dims = f"H {shape.H}, key/value heads {shape.KV}, D {shape.D}, C {shape.C}, F {shape.F}, V {shape.V}"
        lines += ["", f"## {shape.name}", "", f"{dims}; {shape.S} cached keys when decoding.", ""]
        lines += _table(shape, DEVICES, budget)
    return "\n".join(lines) + "\n"
