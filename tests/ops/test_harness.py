"""The harness itself: what carries tensors to another device and back, tried with the CPU as that device."""

import pytest
import torch

from tests.ops import harness

HERE = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_keeps_layout_and_alignment(dtype):
    x = torch.randn(60)
    for view in (x, x[1:].view(59), x.view(6, 10).T[3:, ::2], x[:6].view(6, 1).expand(6, 4), x[5], x[60:], x[:0]):
        copy = harness.copy_of(view, dtype)
        assert copy.dtype == dtype
        assert (copy.shape, copy.stride()) == (view.shape, view.stride())
        assert copy.storage_offset() == view.storage_offset()
        assert torch.equal(copy, view.to(dtype))
        assert copy.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
    assert harness.copy_of(x[1:]).data_ptr() % 16 == 4


def test_results_gradients_and_changes_come_back():
    def function(tensors, *, factor):
        assert tensors[0].data_ptr() != x.data_ptr()
        with torch.no_grad():
            tensors[1].mul_(10)
        return (tensors[0] * factor["by"]).T, "text"

    x, changed, by = torch.randn(3, 4, requires_grad=True), torch.ones(2), torch.full((4,), 2.0, requires_grad=True)
    y, text = harness.call_there(function, HERE, [x, changed], factor={"by": by})
    assert text == "text"
    assert torch.equal(y, (2 * x).T)
    assert torch.equal(changed, torch.full((2,), 10.0))
    dx, dby = torch.autograd.grad(y.sum(), (x, by))
    torch.testing.assert_close(dx, torch.full((3, 4), 2.0))
    torch.testing.assert_close(dby, x.detach().sum(0))


def test_every_backend_has_a_device():
    devices = {
        backend: harness.device(backend).type for backend in (None, "fused", "reference", "torch", "cpu", "simt")
    }
    assert set(devices.values()) == {"cpu"}
    assert harness.device("cuda").type == "cuda"
