"""On a GPU, every operator against its peers: ``python -m benchmarks.gpu [--output FILE]``; ``make gpu`` runs it.

Ours: the CUDA kernel and the Triton kernel, side by side; the report says which of them owns the operator on this GPU.
Peers: torch eager (for attention its scaled_dot_product_attention), torch.compile of that, and flash-attn and Liger
where they are installed. Everything is bfloat16, at the shapes of fastgpt/gpu/predictions.py, timed by CUDA events in
interleaved rounds. Beside the time stands the floor of the same work on this GPU, where its data sheet is known there.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastgpt
from benchmarks import harness
from benchmarks.harness import Call
from fastgpt import ops
from fastgpt.gpu import predictions
from fastgpt.gpu.predictions import Shape
from fastgpt.ops import native, owners, registry

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """``calls``: by backend where they are ours, else by the peer's name. ``works``: the formulas of predictions.py
    that it comes to."""

    name: str
    op: str
    works: tuple[str, ...]
    calls: dict[str, Call | harness.Missing]


def _calls(
    work: str, function: Callable[..., Any], *inputs: Any, compiled: bool = True, **options: Any
) -> dict[str, Call | harness.Missing]:
    """Ours, torch's, and torch's compiled; ``work`` is forward or forward_backward."""
    make = getattr(harness, work)
    device = next(t.device for t in inputs if isinstance(t, torch.Tensor))
    chosen = (*_ours(function.__name__, device), "torch")
    calls = {backend: make(function, *inputs, backend=backend, **options) for backend in chosen}
    if compiled:
        plain = torch.compile(lambda *a, **o: function(*a, backend="torch", **o), dynamic=False)
        calls["torch.compile"] = make(plain, *inputs, **options)
    return calls


def _ours(op: str, device: torch.device) -> list[str]:
    """Our backends that have kernels of ``op`` for tensors on ``device``."""
    return [
        backend
        for backend in ("cpu", "cuda", "triton")
        if native.DEVICE_TYPES[backend] == device.type and registry.missing(op, backend) is None
    ]


def cases(shape: Shape, device: torch.device, *, compiled: bool = True) -> Iterator[Case]:
    """Every operator at a shape, one at a time: each case's tensors are gone before the next one's."""
    s = shape
    liger = functools.partial(harness.optional, "liger_kernel.transformers.functional")

    def randn(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device).requires_grad_()

    for work in ("forward", "forward_backward"):
        make = getattr(harness, work)
        both = work == "forward_backward"

        def works(forward: str, backward: str, both: bool = both) -> tuple[str, ...]:
            return (forward, backward) if both else (forward,)

        q, k, v = (randn(s.B, s.T, heads, s.D).transpose(1, 2) for heads in (s.H, s.KV, s.KV))
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        calls = _calls(work, ops.attention, q, k, v, is_causal=True, enable_gqa=s.H != s.KV, compiled=compiled)
        rows = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
        calls["flash-attn"] = make(harness.optional("flash_attn", "flash_attn_func"), *rows, causal=True)
        yield Case(
            f"attention {work}", "attention", works("attention forward, causal", "attention backward, causal"), calls
        )

        x, residual, weight, bias = randn(s.N, s.C), randn(s.N, s.C), randn(s.C), randn(s.C)
        calls = _calls(work, ops.layer_norm, x, (s.C,), weight, bias, residual=residual, compiled=compiled)
        name = "layer_norm {}, + residual"
        yield Case(f"layer_norm {work}", "layer_norm", works(name.format("forward"), name.format("backward")), calls)
        calls = _calls(work, ops.rms_norm, x, (s.C,), weight, 1e-5, residual=residual, compiled=compiled)
        calls["Liger (no residual)"] = make(liger("liger_rms_norm"), x, weight, 1e-5, in_place=False)
        name = "rms_norm {}, + residual"
        yield Case(f"rms_norm {work}", "rms_norm", works(name.format("forward"), name.format("backward")), calls)

        x, up = randn(s.N, s.F), randn(s.N, s.F)
        calls = _calls(work, ops.gelu, x, "tanh", compiled=compiled)
        yield Case(f"gelu {work}", "gelu", works("gelu forward (tanh)", "gelu backward (tanh)"), calls)
        calls = _calls(work, ops.swiglu, x, up, compiled=compiled)
        calls["Liger"] = make(liger("liger_swiglu"), x, up)
        yield Case(f"swiglu {work}", "swiglu", works("swiglu forward", "swiglu backward"), calls)

        logits, target = randn(s.N, s.V), torch.randint(s.V, (s.N,), device=device)
        if both:
            calls = _calls(work, ops.cross_entropy, logits, target, compiled=compiled)
            yield Case(
                f"cross_entropy {work}", "cross_entropy", ("cross_entropy forward and gradient, in place",), calls
            )
        del logits
        hidden, head = randn(s.N, s.C), randn(s.V, s.C)
        if both:
            calls = _calls(work, ops.linear_cross_entropy, hidden, head, target, compiled=compiled)
            calls["Liger"] = make(liger("liger_fused_linear_cross_entropy"), hidden, head, target)
            yield Case(f"linear_cross_entropy {work}", "linear_cross_entropy", (), calls)
        tokens = torch.randint(s.V, (s.B, s.T), device=device)
        calls = _calls(work, ops.embedding, tokens, head, compiled=compiled)
        yield Case(f"embedding {work}", "embedding", works("embedding forward", "embedding backward"), calls)

    cos, sin = (t.to(device) for t in ops.rotary_tables(s.T, s.D))
    q = randn(s.B, s.T, s.H + s.KV, s.D).detach().transpose(1, 2)
    calls = _calls("forward", ops.rotary, q, cos, sin, compiled=compiled)
    yield Case("rotary forward", "rotary", ("rotary of q and k",), calls)

    query, key, value = (randn(s.B, h, t, s.D).detach() for h, t in ((s.H, 1), (s.KV, s.S), (s.KV, s.S)))
    calls = _calls("forward", ops.attention, query, key, value, enable_gqa=s.H != s.KV, compiled=compiled)
    yield Case("attention of one query", "attention", ("attention, one query a sequence, S cached keys",), calls)

    logits = randn(s.B, s.V).detach()
    calls = _calls("forward", ops.sample, logits, temperature=0.8, top_k=50, top_p=0.9, seed=1, compiled=False)
    yield Case("sample", "sample", ("sample, one token a sequence",), calls)

    # A twentieth of the parameters: the time of AdamW is proportional to their number.
    def parameters() -> list[torch.Tensor]:
        made = [randn(max(s.P // 2000, 1)) for _ in range(100)]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    steps = {b: fastgpt.AdamW(parameters(), lr=1e-3, backend=b).step for b in _ours("adamw", device)}
    steps["torch fused (bfloat16 averages)"] = torch.optim.AdamW(parameters(), lr=1e-3, fused=True).step
    yield Case("adamw of a twentieth of the parameters", "adamw", (), steps)


def _floor(case: Case, shape: Shape, device: predictions.Device | None) -> float | None:
    if device is None or not case.works:
        return None
    formulas = {formula.work: formula for formula in predictions.FORMULAS}
    return sum(predictions.floor(formulas[work].count(shape), device)[0] for work in case.works)


def known_device(name: str) -> predictions.Device | None:
    """The data sheet of the GPU that calls itself ``name``, if predictions.py has it."""
    marks = {"A100": "A100 80GB SXM", "H100": "H100 SXM", "4090": "RTX 4090"}
    wanted = next((full for mark, full in marks.items() if mark in name), None)
    return next((device for device in predictions.DEVICES if device.name == wanted), None)


def run(
    timer: Callable[[Call], float],
    device: torch.device,
    name: str,
    shapes: tuple[Shape, ...] = predictions.SHAPES,
    *,
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """One row per shape and case: seconds of each call, seconds of the floor; or why a call failed."""
    rows = []
    for shape in shapes:
        for case in cases(shape, device, compiled=compiled):
            missing = {n: peer.why for n, peer in case.calls.items() if isinstance(peer, harness.Missing)}
            calls = {name: call for name, call in case.calls.items() if name not in missing}
            failed: dict[str, str] = {}
            for peer, call in list(calls.items()):
                try:
                    with fastgpt.strict():  # a fallback to the reference is no time of a kernel
                        call()
                except Exception as error:  # a peer, or ours, that cannot: the report says so and goes on
                    failed[peer] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    del calls[peer]
            rows.append(
                {
                    "shape": shape.name,
                    "case": case.name,
                    "owner": registry.owner_on(case.op, owners.place(device), DTYPE).backend,
                    "seconds": harness.interleaved(calls, timer) if calls else {},
                    "floor": _floor(case, shape, known_device(name)),
                    "failed": failed,
                    "missing": missing,
                }
            )
            print(f"{shape.name}: {case.name}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every operator on a GPU against its peers.")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "benchmarks.gpu: there is no GPU that torch can use, so nothing was timed.\n")
    rows = run(harness.GpuTimer(), torch.device("cuda"), torch.cuda.get_device_name())
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
