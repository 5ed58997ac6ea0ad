"""attention_with_kvcache against torch over the whole cache with a mask. Bytes: the keys and values that count."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness
from fastgpt import ops

HEADS, DIM, CAPACITY, PAGE = 12, 64, 2048, 64
LENGTHS = [2048, 100, 1500, 700, 333, 1024, 17, 512]


@pytest.mark.quick(kv_heads=4, dtype=torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [12, 4])
@pytest.mark.parametrize("pages", [False, True], ids=["cache", "pages"])
def test_attention_with_kvcache(benchmark, pages, kv_heads, dtype):
    batch = len(LENGTHS)
    query = torch.randn(batch, 1, HEADS, DIM, dtype=dtype)
    key, value = (torch.randn(batch, CAPACITY, kv_heads, DIM, dtype=dtype) for _ in range(2))
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    visible = (torch.arange(CAPACITY) < lengths[:, None])[:, None, None]

    def masked(query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)

    k_cache, v_cache, table = key, value, None
    if pages:
        table = torch.randperm(batch * CAPACITY // PAGE).view(batch, -1)
        k_cache, v_cache = (torch.empty(table.numel(), PAGE, kv_heads, DIM, dtype=dtype) for _ in range(2))
        k_cache[table], v_cache[table] = (x.unflatten(1, (-1, PAGE)) for x in (key, value))
        table = table.int()
    harness.versus(
        benchmark,
        harness.forward(ops.attention_with_kvcache, query, k_cache, v_cache, lengths, table, is_causal=True),
        {"masked": harness.forward(masked, query, key, value)},
        bytes=2 * sum(LENGTHS) * kv_heads * DIM * key.element_size(),
        flops=4 * HEADS * DIM * sum(LENGTHS),
    )
