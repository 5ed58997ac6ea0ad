"""The memory of large results: reused when a result is dead, never before."""

import gc

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import memory

COUNT = memory.SMALLEST // 4  # of float32: the smallest result that is kept


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory.release()
    before = memory.kept()
    yield
    gc.collect()
    memory.release()
    assert memory.kept() == before, "a test left memory behind"


def test_memory_of_a_dead_result_is_reused():
    first = memory.empty((COUNT,), torch.empty(0))
    address = first.data_ptr()
    del first
    second = memory.empty((2, COUNT), torch.empty(0, dtype=torch.bfloat16))
    assert (second.data_ptr(), second.shape, second.dtype) == (address, (2, COUNT), torch.bfloat16)
    assert second.is_contiguous()
    assert second.data_ptr() % 64 == 0


def test_memory_in_use_is_not_given_away():
    first = memory.empty((4, COUNT), torch.empty(0)).fill_(1.0)
    row = first[2].detach()  # a view keeps all of it
    del first
    others = [memory.empty((4, COUNT), torch.empty(0)).fill_(2.0) for _ in range(3)]
    assert len({t.data_ptr() for t in others}) == 3
    assert (row == 1.0).all()


def test_what_autograd_saves_is_in_use():
    x = torch.randn(COUNT // 256, 256, requires_grad=True)
    middle = ops.gelu(x, backend="cpu")
    y = ops.gelu(middle, backend="cpu")
    middle_address = middle.data_ptr()
    del middle
    others = [ops.gelu(torch.randn(COUNT // 256, 256), backend="cpu") for _ in range(3)]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (exact,) = torch.autograd.grad(ops.gelu(ops.gelu(x, backend="reference"), backend="reference").sum(), x)
    torch.testing.assert_close(gradient, exact)
    assert len({middle_address, *(t.data_ptr() for t in others)}) == 4


def test_small_results_are_torchs():
    before = memory.kept()
    assert memory.empty((COUNT - 1,), torch.empty(0)).shape == (COUNT - 1,)
    assert memory.empty((0, 3), torch.empty(0)).shape == (0, 3)
    assert memory.empty((COUNT,), torch.empty(0, device="meta")).device.type == "meta"
    assert memory.kept() == before


def test_at_most_the_limit_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "LIMIT", memory.kept() + 3 * memory.SMALLEST)
    results = [memory.empty((COUNT,), torch.empty(0)) for _ in range(5)]
    assert len({t.data_ptr() for t in results}) == 5
    assert memory.kept() == memory.LIMIT
    del results
    larger = memory.empty((2, COUNT), torch.empty(0))  # two dead blocks make room
    assert larger.shape == (2, COUNT)
    assert memory.kept() == memory.LIMIT


def test_memory_is_poisoned_where_torch_poisons_its_own():
    memory.empty((COUNT,), torch.empty(0)).fill_(1.0)
    assert memory.empty((COUNT,), torch.empty(0)).isnan().all()  # conftest.py asks for it
