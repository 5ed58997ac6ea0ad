"""``fastgpt doctor``: what this installation is made of and which kernels it uses."""

from __future__ import annotations

import platform

import torch

import fastgpt
from fastgpt.ops.native import _C


def doctor() -> None:
    """Print versions, instruction set, threads, GPU and which backend owns each operator."""
    print(f"fastgpt {fastgpt.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"threads: {torch.get_num_threads()} (torch's pool; the kernels see {_C.thread_count()})")
    fastgpt.explain()
