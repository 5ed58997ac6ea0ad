"""One training step (loss, backward, clipping, AdamW) of a small GPT-2 against the same model on torch's operators.

FLOP: the matrix products that GPT.estimate_flops counts; they are torch's in both, and bound what fusing can gain.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import GPT, AdamW, GPTConfig

BATCH, CONTEXT = 4, 256
CONFIG = GPTConfig.preset("gpt2", layers=4, heads=6, width=384, context=CONTEXT)


def step(ops: str, dtype: torch.dtype) -> harness.Call:
    torch.manual_seed(0)
    model = GPT(CONFIG, ops, dtype=dtype)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONTEXT + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if ops == "torch":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = AdamW(model.parameters(), lr=1e-4, max_grad_norm=1.0)

    def call() -> None:
        optimizer.zero_grad()
        model(inputs, targets).backward()
        if ops == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return call


@pytest.mark.quick(dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step(benchmark, dtype):
    """In bfloat16, ours keeps float32 master weights and moments; torch's optimizer updates the bfloat16 weights."""
    flops = GPT(CONFIG, device="meta").estimate_flops(BATCH * CONTEXT)
    harness.versus(benchmark, step("fused", dtype), {"torch": step("torch", dtype)}, flops=flops)
