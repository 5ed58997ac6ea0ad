import pytest
import torch

from fastgpt.ops.native import _C


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN (or the largest integer), so a kernel that forgets an element is caught."""
    # Below torch.use_deterministic_algorithms, which imports all of torch.compile.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch._C._set_deterministic_algorithms(False, warn_only=False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name, _, supported in _C.cpu.isas() if supported])
def isa(request):
    """Each instruction-set level that this machine has."""
    before = _C.cpu.isa()
    assert _C.cpu.set_isa(request.param)
    yield request.param
    _C.cpu.set_isa(before)
