"""Triton kernels with planted faults, compiled for some architectures: run by test_triton_build.py in a process where
Triton compiles rather than interprets. Writes what was found as JSON."""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from fastgpt.gpu import budget, catalogue, triton_build
from fastgpt.kernels.launch import Launch, one_config


@triton.jit
def copy_kernel(y, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def dot_kernel(y, a, b, SIZE: tl.constexpr):
    row, col = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + row * SIZE + col), tl.load(b + row * SIZE + col))
    tl.store(y + row * SIZE + col, product.to(y.dtype.element_ty))


@triton.jit
def broken_kernel(y, SIZE: tl.constexpr):
    tl.store(y + tl.arange(0, SIZE), 0.0)


def by_architecture(target):
    """One configuration on sm_80, another on sm_86 and sm_89."""
    small = target.backend == "cuda" and target.arch in (86, 89)
    return [triton.Config({"BLOCK": 256 if small else 1024}, num_warps=4)]


def half(*shape):
    return torch.empty(shape, dtype=torch.float16)


def planted(kernel, *args, configs):
    return Launch(kernel, args, {}, configs, {"enable_fp_fusion": True})


WIDE = one_config(BLOCK=1024)
RECORDED = [
    ("copy", "aligned", planted(copy_kernel, half(4096), half(4096), 4096, configs=WIDE)),
    ("copy", "again", planted(copy_kernel, half(8192), half(8192), 8192, configs=WIDE)),
    ("copy", "odd length", planted(copy_kernel, half(4097), half(4097), 4097, configs=WIDE)),
    ("copy", "by architecture", planted(copy_kernel, half(4096), half(4096), 4096, configs=by_architecture)),
    ("dot", "dot", planted(dot_kernel, *(half(64, 64),) * 3, configs=one_config(SIZE=64))),
    ("dot", "too large", planted(dot_kernel, *(half(256, 256),) * 3, configs=one_config(SIZE=256, num_warps=16))),
    ("broken", "not a power of two", planted(broken_kernel, half(100), configs=one_config(SIZE=100))),
]

if __name__ == "__main__":
    recorded = [(catalogue.Case(op, label, print), launch) for op, label, launch in RECORDED]
    triton_build._jobs[:] = triton_build._list_jobs(recorded, sys.argv[2:])
    found = triton_build._compile(range(len(triton_build._jobs)), Path(sys.argv[1]))
    rules = budget.parse(Path(sys.argv[1], "rules.toml").read_text())
    kernels = [c.kernel for c in found if c.kernel is not None]
    launches = {k.name: {(k.threads, 0)} for k in kernels}
    held = budget.parse(budget.render(rules.head, budget.measure(kernels, launches, rules)))
    Path(sys.argv[1], "found.json").write_text(
        json.dumps(
            {
                "compiled": [[c.name, c.architecture, c.default] for c in found if not c.failed],
                "also": {c.name: list(c.kernel.runs_also_on) for c in found if c.architecture == "sm_80" and c.kernel},
                "opcodes": {f"{k.name} {k.architecture}": k.opcodes for k in kernels},
                "violations": [str(v) for v in triton_build.violations(found) + budget.check(kernels, held, launches)],
            }
        )
    )
