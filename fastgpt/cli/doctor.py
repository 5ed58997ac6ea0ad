"""``fastgpt doctor``: what this installation is made of, which kernels it uses, and how exact each one is here."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastgpt
from fastgpt import ops
from fastgpt.ops.accuracy import error_and_budget
from fastgpt.ops.native import _C, torch_threads


@dataclass
class Case:
    """One small call of an operator: ``run(backend, **tensors)``; floating tensors are given in float64."""

    run: Callable[..., Any]
    tensors: dict[str, Tensor]


def cases() -> dict[str, Case]:
    """A call of every operator, with odd sizes and its usual options."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    cos, sin = ops.rotary_tables(40, 24, dtype=torch.float64)
    state = {"param": randn(33, 7), "grad": randn(33, 7), "exp_avg": randn(33, 7), "exp_avg_sq": randn(33, 7).square()}

    def adamw(backend: str, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        param = param.detach().clone()
        # The state of low-precision parameters is float32.
        states = [t.detach().to(torch.promote_types(t.dtype, torch.float32), copy=True) for t in (exp_avg, exp_avg_sq)]
        ops.adamw([param], [grad.detach()], states[:1], states[1:], step=3, lr=0.01, max_norm=1.0, backend=backend)
        return param

    return {
        "attention": Case(
            lambda backend, q, k, v: ops.attention(q, k, v, is_causal=True, enable_gqa=True, backend=backend),
            {"q": randn(2, 4, 37, 24), "k": randn(2, 2, 37, 24), "v": randn(2, 2, 37, 24)},
        ),
        "attention_varlen": Case(
            lambda backend, q, k, v, ends: ops.attention_varlen(
                q, k, v, ends, ends, 32, 32, is_causal=True, backend=backend
            ),
            {"q": randn(67, 4, 24), "k": randn(67, 2, 24), "v": randn(67, 2, 24), "ends": int32(0, 5, 35, 67)},
        ),
        "attention_with_kvcache": Case(  # which has no gradient
            lambda backend, q, k, v, lengths: ops.attention_with_kvcache(
                q.detach(), k.detach(), v.detach(), lengths, is_causal=True, backend=backend
            ),
            {"q": randn(3, 2, 4, 24), "k": randn(3, 40, 2, 24), "v": randn(3, 40, 2, 24), "lengths": int32(40, 7, 19)},
        ),
        "cross_entropy": Case(
            lambda backend, x, target: ops.cross_entropy(x, target, label_smoothing=0.1, backend=backend),
            {"x": randn(19, 123), "target": randint(123, 19)},
        ),
        "embedding": Case(
            lambda backend, tokens, weight, position: ops.embedding(
                tokens, weight, position_weight=position, backend=backend
            ),
            {"tokens": randint(50, 3, 17), "weight": randn(50, 33), "position": randn(20, 33)},
        ),
        "gelu": Case(
            lambda backend, x, bias: ops.gelu(x, "tanh", bias=bias, backend=backend),
            {"x": randn(19, 123), "bias": randn(123)},
        ),
        "layer_norm": Case(
            lambda backend, x, weight, bias, residual: ops.layer_norm(
                x, (123,), weight, bias, residual=residual, backend=backend
            ),
            {"x": randn(19, 123), "weight": randn(123), "bias": randn(123), "residual": randn(19, 123)},
        ),
        "linear_cross_entropy": Case(
            lambda backend, x, weight, target: ops.linear_cross_entropy(x, weight, target, backend=backend),
            {"x": randn(19, 32), "weight": randn(123, 32), "target": randint(123, 19)},
        ),
        "rms_norm": Case(
            lambda backend, x, weight: ops.rms_norm(x, (123,), weight, 1e-5, backend=backend),
            {"x": randn(19, 123), "weight": randn(123)},
        ),
        "rotary": Case(
            lambda backend, x: ops.rotary(x, cos.to(x.dtype), sin.to(x.dtype), offsets=3, backend=backend),
            {"x": randn(2, 3, 37, 24)},
        ),
        "sample": Case(  # the log-probability of the token; the tokens themselves are compared by the tests
            lambda backend, logits: ops.sample(logits, temperature=0.8, top_k=20, seed=1, backend=backend)[1],
            {"logits": randn(9, 123)},
        ),
        "swiglu": Case(
            lambda backend, gate, up: ops.swiglu(gate, up, backend=backend),
            {"gate": randn(19, 123), "up": randn(19, 123)},
        ),
        "adamw": Case(adamw, state),
    }


def measure(case: Case, backend: str, dtype: torch.dtype) -> Iterator[tuple[str, float, float]]:
    """(what, error, budget) of every output and gradient of a case."""

    def evaluate(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = {
            name: t.to(rounded).to(dtype).requires_grad_() if t.is_floating_point() else t
            for name, t in case.tensors.items()
        }
        result = case.run(backend, **inputs)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        roots = [t for t in outputs if t.requires_grad]
        leaves = {name: t for name, t in inputs.items() if t.requires_grad}
        if roots:
            generator = torch.Generator().manual_seed(1)
            upstream = [torch.randn(t.shape, generator=generator).to(rounded).to(t.dtype) for t in roots]
            gradients = torch.autograd.grad(roots, list(leaves.values()), upstream)
            found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return found

    rounded = dtype  # every run sees the inputs as this dtype holds them
    actual, plain, exact = evaluate(backend, dtype), evaluate("torch", dtype), evaluate("torch", torch.float64)
    for name, value in actual.items():
        yield name, *error_and_budget(value, plain[name], exact[name])


def doctor() -> None:
    """Print versions, instruction set, threads, GPU, the owner of every operator, and each one's measured error.

    The error is the largest one against float64, over the operator's outputs and gradients, beside its budget: twice
    plain PyTorch's error in the same dtype plus one rounding. Ends with status 1 if a kernel is over its budget.
    """
    pool = "torch's pool" if torch_threads else "the core's own; this torch does not lend its pool"
    print(f"fastgpt {fastgpt.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"threads: {_C.thread_count()} ({pool})")
    fastgpt.explain()

    table = Table(title="Error of the CPU kernels against float64")
    for heading, width in (("operator", 8), ("dtype", 8), ("worst at", 8), ("error", 7), ("budget", 7), ("", 2)):
        table.add_column(heading, no_wrap=True, min_width=width)  # a narrow terminal cuts the names, not the numbers
    sound = True
    for name, case in sorted(cases().items()):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            what, error, budget = max(
                measure(case, "cpu", dtype), key=lambda found: found[1] / found[2] if found[2] else found[1]
            )
            fine = error <= budget
            sound &= fine
            verdict = "[green]ok[/green]" if fine else "[red]over budget[/red]"
            table.add_row(name, str(dtype).removeprefix("torch."), what, f"{error:.1e}", f"{budget:.1e}", verdict)
    Console().print(table)
    if not sound:
        print("A kernel is over its error budget on this machine: please report it with this output.")
        raise typer.Exit(1)
