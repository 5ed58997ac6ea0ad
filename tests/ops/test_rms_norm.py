import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("rms_norm")
SHAPES = [(5, 123, 123), (4, 768), (1, 1), (3, 1), (1, 65536), (200, 17), (7,), (130, 64)]


def make(shape, dims=1, residual=True, weight=True, scale=1.0):
    tensors = {"input": torch.randn(shape, dtype=torch.float64) * scale}
    if residual:
        tensors["residual"] = torch.randn(shape, dtype=torch.float64) * scale
    if weight:
        tensors["weight"] = torch.randn(shape[-dims:], dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def runner(normalized_shape, eps=1e-5):
    return lambda backend, **t: ops.rms_norm(
        t["input"], normalized_shape, t.get("weight"), eps, residual=t.get("residual"), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, backend):
    # A 1-wide row is x / sqrt(x^2 + eps): for a small eps its gradient is all cancellation, in torch as well.
    harness.check(runner(shape[-1:], eps=1.0 if shape[-1] == 1 else 1e-5), make(shape), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("parts", [(r, w) for r in (0, 1) for w in (0, 1)])
def test_optional_parts(parts, dtype, backend):
    harness.check(runner((33,)), make((70, 33), 1, *parts), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parts", [(0, 0), (0, 1), (1, 0)])
def test_optional_parts_of_wide_rows(parts, backend):
    harness.check(runner((16402,)), make((2, 16402), 1, *parts), torch.float32, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype):
    for shape in [(5, 123), (66, 64), (2, 3)]:
        harness.check(runner(shape[-1:]), make(shape), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    for _, view in harness.layouts(torch.randn(24, 264, dtype=torch.float64)):
        tensors = {**make((24, 264)), "input": view.requires_grad_()}
        harness.check(runner((264,)), tensors, torch.float32, backend)


# On a GPU a row is shared out by its width: part of a warp, one, several, with what registers hold and more.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(40, 2), (9, 31), (9, 32), (3, 255), (5, 1024), (2, 1032), (2, 4099), (2, 8200), (3, 16402)]
)
def test_widths(shape, dtype, backend):
    harness.check(runner(shape[-1:]), make(shape), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("moved", [("input",), ("weight",), ("input", "residual", "weight")])
def test_misaligned_views(moved, dtype, backend):
    tensors = make((5, 64))
    for name in moved:
        _, (_, view), *_ = harness.layouts(tensors[name].detach())
        tensors[name] = view.requires_grad_()
    harness.check(runner((64,)), tensors, dtype, backend)


# More rows than one chunk of the weights' gradients takes, and chunks than are added side by side.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(601, 40), (8300, 3), (1100, 130), (37, 4100)])
def test_many_rows(shape, backend):
    harness.check(runner(shape[-1:]), make(shape), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_normalized_dimensions(backend):
    harness.check(runner((4, 5, 6)), make((3, 2, 4, 5, 6), dims=3), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weight_of_a_bfloat16_input(backend):
    x, weight = torch.randn(9, 50).bfloat16(), torch.randn(50, requires_grad=True)
    y = ops.rms_norm(x, (50,), weight, backend=backend)
    exact = ops.rms_norm(x.double(), (50,), weight.double(), torch.finfo(torch.float32).eps, backend="torch")
    assert y.dtype == torch.bfloat16
    harness.assert_within_budget("y", y, exact.bfloat16(), exact)
    upstream = torch.randn(9, 50).bfloat16()
    (gradient,) = torch.autograd.grad(y, weight, upstream)
    (exact_gradient,) = torch.autograd.grad(exact, weight, upstream.double())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact_gradient.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*harness.FLOATS, torch.float64])
def test_default_eps_is_torchs(dtype, backend):
    if backend != "reference" and dtype == torch.float64:
        return  # test_float64_goes_to_the_reference_openly
    x = torch.full((2, 16), 1e-4, dtype=dtype)  # small, so that eps is most of the root
    plain = torch.nn.functional.rms_norm(x, (16,))
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    exact = torch.nn.functional.rms_norm(x.double(), (16,), eps=eps)
    harness.assert_within_budget("y", ops.rms_norm(x, (16,), backend=backend), plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 1e-40])
def test_extreme_scales(scale, backend):
    harness.check(runner((100,)), make((8, 100), scale=scale), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_nan_leaves_its_neighbours_alone(backend):
    x = torch.randn(3, 40)
    x[1, 7] = float("nan")
    y = ops.rms_norm(x, (40,), backend=backend)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], ops.rms_norm(x[::2], (40,), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape, backend):
    harness.check(runner((8,)), make(shape), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sum_is_used(backend):
    t = harness.cast(make((4, 10)), torch.float32)
    runner((10,))(backend, **t)[1].sum().backward()
    torch.testing.assert_close(t["input"].grad, torch.ones(4, 10))
    torch.testing.assert_close(t["residual"].grad, torch.ones(4, 10))


@pytest.mark.parametrize("parts", [(0, 0), (1, 1)])
def test_gradcheck_of_the_formula(parts):
    t = make((3, 4, 5), 1, *parts)
    names = list(t)
    assert torch.autograd.gradcheck(
        lambda *values: runner((5,))("reference", **dict(zip(names, values, strict=True))), tuple(t.values())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend):
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(NotImplementedError, match="rms_norm: the gradient has no derivative of its own"):
        torch.autograd.grad(ops.rms_norm(x, (8,), backend=backend).sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    x, r, w = (torch.randn(s, requires_grad=True) for s in ((3, 8), (3, 8), (8,)))
    harness.opcheck("rms_norm", (x, r, w, 1, 1e-5, backend))
    harness.opcheck("rms_norm", (x, None, None, 1, 1e-5, backend))
    harness.opcheck("rms_norm_backward", (*(t.detach() for t in (x, r, x, w)), torch.rand(3), 1, backend))


def test_compiles_without_graph_breaks():
    t = harness.cast(make((4, 16)), torch.float32)
    run = runner((16,))
    compiled = torch.compile(lambda **t: run("cpu", **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(4, 16), torch.randn(4, 16)]
    eager = harness.run_with_gradients(run, "cpu", t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


def test_bits_do_not_depend_on_threads(restore_threads):
    t = harness.cast(make((333, 200)), torch.float32)
    upstream = [torch.randn(333, 200), torch.randn(333, 200)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(runner((200,)), "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


@pytest.mark.parametrize("width", [24, 77, 1024, 4100])
def test_bits_do_not_depend_on_the_schedule(width):
    t = harness.cast(make((37, width)), torch.float32)
    upstream = [torch.randn(37, width), torch.randn(37, width)]

    def run():
        outputs, gradients = harness.run_with_gradients(runner((width,)), "simt", t, upstream)
        return [*outputs, *gradients.values()]

    harness.assert_same_bits(harness.under_every_schedule(run), "the order of lanes and blocks changes the result")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [77, 96, 2048])
def test_bits_do_not_depend_on_batch_neighbours(width, backend):
    x = torch.randn(50, width)
    whole = ops.rms_norm(x, (width,), backend=backend)
    alone = ops.rms_norm(x[31:32].clone(), (width,), backend=backend)
    harness.assert_same_bits([[whole[31:32]], [alone]], "neighbours matter")


def test_float64_goes_to_the_reference_openly():
    x = torch.randn(2, 8, dtype=torch.float64)
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"rms_norm.*float64.*strict"):
        ops.rms_norm(x, (8,))
    with pytest.raises(NotImplementedError, match=r"backend='cpu' does not take dtype torch.float64"):
        ops.rms_norm(x, (8,), backend="cpu")
    assert torch.equal(ops.rms_norm(x, (8,)), ops.rms_norm(x, (8,), backend="reference"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8).long()}, TypeError, r"rms_norm: input has dtype torch.int64; allowed are float32"),
        ({"input": "x"}, TypeError, r"input must be a Tensor, not str"),
        ({"normalized_shape": (7,)}, ValueError, r"normalized_shape=\(7,\) must be the last dimensions .*\(2, 8\)"),
        ({"normalized_shape": ()}, ValueError, r"normalized_shape=\(\)"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"weight": torch.ones(8).bfloat16()}, TypeError, r"weight has dtype torch.bfloat16; it must be torch.float32"),
        ({"weight": torch.ones(8, device="meta")}, ValueError, r"weight is on meta, but input is on cpu"),
        ({"residual": torch.ones(8)}, ValueError, r"residual has shape \(8,\); it must be \(2, 8\)"),
        ({"residual": torch.ones(2, 8).bfloat16()}, TypeError, r"residual has dtype torch.bfloat16"),
        (
            {"backend": "gpu"},
            ValueError,
            r"backend='gpu' is unknown; allowed are 'fused', 'reference', 'cpu'",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(**{"input": torch.ones(2, 8), "normalized_shape": (8,), **change})


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    normalized=st.lists(st.integers(0, 5), min_size=0, max_size=4),
)
def test_any_shape_is_taken_or_refused_as_torch_does(shape, normalized):
    x = torch.ones(shape)
    try:
        expected = torch.nn.functional.rms_norm(x, normalized)
    except (RuntimeError, ValueError):
        with pytest.raises(ValueError, match="normalized_shape"):
            ops.rms_norm(x, normalized)
    else:
        assert ops.rms_norm(x, normalized).shape == expected.shape
