"""No operator with a CUDA kernel waits for the device, so that each can be captured in a CUDA graph.

The emulator runs what CUDA runs, on CPU tensors: a torch operator that would wait for a GPU is recognised by its name.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.ops import native, registry
from tests.simt.calls import CALLS

pytest.importorskip("fastgpt._simt", reason="this build has no emulator (FASTGPT_SIMT=on)")

# Operators whose result is a number for Python, or has a shape that depends on the data.
WAITING = {
    "_local_scalar_dense",  # .item(), bool(), int()
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}


class RefuseToWait(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "fastgpt":  # goes on inside
            with self:
                return registry._IMPLEMENTATIONS[name][args[-1]](*args[:-1], **(kwargs or {}))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        repeats = name == "repeat_interleave" and func._overloadname in ("Tensor", "self_Tensor")
        if name in WAITING or by_mask or repeats:
            raise AssertionError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [n for n in CALLS if n.split(":")[0] not in ("attention", "sample")])
def test_no_operator_waits(name):
    if why := native.missing("simt", name.split(":")[0]):
        pytest.skip(why)
    with RefuseToWait():
        CALLS[name]()


def test_waiting_is_recognised():
    x = torch.randn(4, 5)
    with RefuseToWait():
        for wait in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0], lambda: (x > 0).nonzero()):
            with pytest.raises(AssertionError, match="would wait for the device"):
                wait()
        with pytest.raises(AssertionError, match="would wait for the device"):
            ops.linear_cross_entropy(x, torch.randn(3, 5), torch.tensor([0, 1, 2, 1]), backend="cpu")
