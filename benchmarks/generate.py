"""Decoding with a KV cache against the same loop on torch's operators. Bytes: every weight is read for every token.

Flops: two a weight and token.
"""

import pytest
import torch

from benchmarks import harness
from fastgpt import GPT, GPTConfig, generate

PROMPT, NEW = 64, 32


@pytest.mark.quick(preset="demo", rows=1)
@pytest.mark.long(preset="gpt2", rows=4)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("preset", ["demo", "gpt2"])
def test_generate(benchmark, preset, rows):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset))
    prompts = torch.randint(model.config.vocab_size, (rows, PROMPT)).tolist()

    def decode(ops: str) -> harness.Call:
        return lambda: generate(model.set_ops(ops), prompts, NEW, top_k=50, top_p=0.95)

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    flops = 2 * rows * NEW * sum(p.numel() for p in model.parameters())
    harness.versus(benchmark, decode("fused"), {"torch": decode("torch")}, bytes=NEW * weights, flops=flops)
    if benchmark.stats is not None:  # not --benchmark-disable
        benchmark.extra_info["tokens/s"] = rows * NEW / benchmark.stats.stats.median
