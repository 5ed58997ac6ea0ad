"""attention_varlen against a padded batch and against a call a sequence. Flops: of the tokens alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from fastgpt import ops

HEADS, DIM = 12, 64
LENGTHS = [1024, 64, 512, 200, 333, 128, 17, 770]


def padded(q, k, v):
    """The tokens moved into a padded batch and back."""
    q, k, v = (torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return torch.cat([row[:length] for row, length in zip(out, LENGTHS, strict=True)])


def one_by_one(q, k, v):
    parts = zip(*(x.transpose(0, 1).split(LENGTHS, 1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1).transpose(0, 1)


@pytest.mark.quick(work="forward_backward", dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", ["forward", "forward_backward"])
def test_attention_varlen(benchmark, work, dtype):
    tensors = [torch.randn(sum(LENGTHS), HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(3)]
    ends = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)

    def packed(q, k, v):
        return ops.attention_varlen(q, k, v, ends, ends, max(LENGTHS), max(LENGTHS), is_causal=True)

    calls = {f.__name__: getattr(harness, work)(f, *tensors) for f in (packed, padded, one_by_one)}
    flops = 2 * HEADS * DIM * sum(n * n for n in LENGTHS) * {"forward": 1, "forward_backward": 3.5}[work]
    moved = {"forward": 4, "forward_backward": 12}[work] * tensors[0].numel() * dtype.itemsize
    harness.versus(benchmark, calls.pop("packed"), calls, bytes=moved, flops=flops)
