"""Device functions of kernels/core.py, each against the same function of the reference."""

import pytest
import torch

from fastgpt.ops import philox

triton = pytest.importorskip("triton", reason="Triton is Linux's only")
tl = triton.language

from fastgpt.kernels import core  # noqa: E402
from fastgpt.kernels.launch import launch, one_config  # noqa: E402

# A parameter of this value lets conftest.py start the runner.
pytestmark = pytest.mark.parametrize("backend", ["triton"])
SEEDS = (0, 1, -1, 2**40 + 5, -(2**63))


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def uniform_bits_kernel(out, seed, row, position, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    bits = core.uniform_bits(tl.load(seed + at), tl.load(row + at), tl.load(position + at))
    tl.store(out + at, bits.to(tl.int64, bitcast=True))


def test_uniform_bits(backend, device):
    seed = torch.tensor([0, 1, 2**32 + 5, -1])
    row = torch.tensor([0, 7, 2**32 - 1, 123456])
    position = torch.tensor([0, 2**32 + 9, 3, 2**62])
    out = torch.empty(4, dtype=torch.int64, device=device)
    launch(
        uniform_bits_kernel,
        (1,),
        out,
        seed.to(device),
        row.to(device),
        position.to(device),
        configs=one_config(COUNT=4),
    )
    expected = philox.uniform_bits(seed, row, position, philox.SAMPLE_STREAM)
    assert [bits % 2**64 for bits in out.tolist()] == expected


@triton.jit
def dropout_values_kernel(out, seed, head, first_query, first_key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    query = tl.arange(0, QUERIES)
    values = core.dropout_values(tl.load(seed), head, first_query + query, first_key, KEYS)
    tl.store(out + query[:, None] * KEYS + tl.arange(0, KEYS)[None, :], values)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("keys", [8, 32])
def test_dropout_values(backend, device, queries, keys):
    for seed in SEEDS:
        for head, first_query, first_key in ((1, 0, 0), (70000, 5, 1000 * 8)):
            out = torch.empty(queries, keys, dtype=torch.int32, device=device)
            launch(
                dropout_values_kernel, (1,), out, torch.tensor([seed], device=device), head, first_query, first_key,
                configs=one_config(QUERIES=queries, KEYS=keys),
            )  # fmt: skip
            expected = philox.dropout_values(torch.tensor([seed]), head, 1, first_query + queries, first_key + keys)[
                0, first_query:, first_key:
            ]
            assert torch.equal(out.cpu().long(), expected)
