import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("gelu")
FORMS = ("none", "tanh")
SHAPES = [(5, 123, 123), (4, 768), (1, 1), (2, 1), (1, 40000), (200, 17), (7,), (130, 64)]


def make(shape, bias=True, scale=2.0):
    tensors = {"input": torch.randn(shape, dtype=torch.float64) * scale}
    if bias:
        tensors["bias"] = torch.randn(shape[-1:], dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def runner(approximate):
    return lambda backend, **t: ops.gelu(t["input"], approximate, bias=t.get("bias"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("approximate", FORMS)
def test_values_and_gradients(approximate, bias, dtype, backend):
    for shape in SHAPES:
        harness.check(runner(approximate), make(shape, bias), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("approximate", FORMS)
def test_every_instruction_set(isa, approximate, dtype):
    for shape in [(5, 123), (66, 64), (2, 3)]:
        for bias in (False, True):
            harness.check(runner(approximate), make(shape, bias), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_layouts(approximate, backend):
    for _, view in harness.layouts(torch.randn(6, 40, dtype=torch.float64)):
        for bias in (False, True):
            tensors = {**make((6, 40), bias), "input": view.requires_grad_()}
            harness.check(runner(approximate), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 8), (3, 0, 8), (3, 0)])
def test_scalars_and_no_elements(shape, approximate, backend):
    for bias in (False, True) if shape else (False,):
        harness.check(runner(approximate), make(shape, bias), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 1e-40])
def test_extreme_scales(scale, approximate, backend):
    harness.check(runner(approximate), make((9, 100), scale=scale), torch.float32, backend)


def check_limits(approximate, backend):
    inf = math.inf
    for dtype in harness.FLOATS:
        x = torch.tensor([-inf, inf, math.nan, 0.0, -0.0, -6e4, 6e4], dtype=dtype).requires_grad_()
        y = ops.gelu(x, approximate, backend=backend)
        expected = torch.tensor([0.0, inf, math.nan, 0.0, -0.0, 0.0, 6e4], dtype=dtype)
        assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0)), dtype
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        expected = torch.tensor([0.0, 1.0, math.nan, 0.5, 0.5, 0.0, 1.0], dtype=dtype)
        torch.testing.assert_close(gradient, expected, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_limits(approximate, backend):
    check_limits(approximate, backend)


@pytest.mark.parametrize("approximate", FORMS)
def test_limits_on_every_instruction_set(isa, approximate):
    check_limits(approximate, "cpu")


def assert_the_tail_is_accurate(backend, roundings, magnified):
    """The relative error of float32 results on [-12, 12], in eps; ``magnified`` by half of x^2 for the exact form."""
    x = torch.linspace(-12, 12, 20001)
    exact = x.double() * torch.special.erfc(-x.double() * math.sqrt(0.5)) / 2
    error = ((ops.gelu(x, backend=backend).double() - exact) / exact).abs()
    eps = torch.finfo(torch.float32).eps
    normal = exact.abs() > torch.finfo(torch.float32).tiny  # subnormal numbers have fewer digits
    assert (error < (roundings + magnified * x.double().square() / 2) * eps)[normal].all()
    z = 2 * math.sqrt(2 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() * torch.sigmoid(z)
    error = ((ops.gelu(x, "tanh", backend=backend).double() - exact) / exact).abs()
    normal = exact.abs() > torch.finfo(torch.float32).tiny
    assert (error < (roundings + 2 * z.abs()) * eps)[normal].all()  # the rounding of z, magnified by z


def test_the_negative_tail_keeps_its_relative_accuracy(isa):
    """1 + erf(x / sqrt 2) is 0 in float32 from -5.5 on; gelu(-5.5) is -1.04e-7 all the same."""
    # Without FMA the rounding of the exponent x^2 / 2 shows, magnified by the exponent itself.
    assert_the_tail_is_accurate("cpu", 4, 1 if isa == "baseline" else 0)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b not in ("reference", "cpu")])
def test_the_negative_tail_keeps_its_relative_accuracy_on_a_gpu(backend):
    assert_the_tail_is_accurate(backend, 6, 0)  # CUDA's expf may be off by 2 roundings


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_float32_bias_of_a_bfloat16_input(approximate, backend):
    x, bias = torch.randn(90, 50).bfloat16(), torch.randn(50, requires_grad=True)
    y = ops.gelu(x, approximate, bias=bias, backend=backend)
    exact = ops.gelu(x.double(), approximate, bias=bias.double(), backend="torch")
    assert y.dtype == torch.bfloat16
    harness.assert_within_budget("y", y, exact.bfloat16(), exact)
    upstream = torch.randn(90, 50).bfloat16()
    (gradient,) = torch.autograd.grad(y, bias, upstream)
    (exact_gradient,) = torch.autograd.grad(exact, bias, upstream.double())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, exact_gradient.float())


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_of_the_formula(approximate, bias):
    t = make((3, 4, 5), bias)
    names = list(t)
    assert torch.autograd.gradcheck(
        lambda *values: runner(approximate)("reference", **dict(zip(names, values, strict=True))), tuple(t.values())
    )


def test_second_derivative():
    """The reference has one; a fused backward says that it has none, rather than leaving its part out in silence."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ops.gelu(x, backend="reference"), x)
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.gelu(x, backend="cpu").sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gelu_backward: backend='cpu' has no second derivative"):
        (gradient.sum() + x.sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", FORMS)
def test_registration(approximate, backend):
    x, b = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    harness.opcheck("gelu", (x, b, approximate, backend))
    harness.opcheck("gelu", (x, None, approximate, backend))
    harness.opcheck("gelu_backward", (*(t.detach() for t in (x, x, b)), approximate, backend))


def test_compiles_without_graph_breaks():
    t = harness.cast(make((4, 16)), torch.float32)
    run = runner("tanh")
    compiled = torch.compile(lambda **t: run("cpu", **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(4, 16)]
    eager = harness.run_with_gradients(run, "cpu", t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("shape", [(3, 4099), (9, 31), (3, 2056), (601, 40), (5000, 8)])
def test_widths_and_rows(shape, dtype, backend):
    for approximate in FORMS:
        harness.check(runner(approximate), make(shape), dtype, backend)


# The Triton kernels have as many programs as there are tiles.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_more_rows_than_a_grid_has_at_once(backend):
    harness.check(runner("tanh"), make((16400, 33)), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("moved", ["input", "bias"])
def test_misaligned_views(moved, dtype, backend):
    tensors = make((5, 64))
    _, (_, view), *_ = harness.layouts(tensors[moved].detach())
    tensors[moved] = view.requires_grad_()
    harness.check(runner("tanh"), tensors, dtype, backend)


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("width", [77, 96])
def test_bits_do_not_depend_on_the_schedule(width, approximate):
    t = harness.cast(make((333, width)), torch.float32)
    upstream = [torch.randn(333, width)]

    def run():
        outputs, gradients = harness.run_with_gradients(runner(approximate), "simt", t, upstream)
        return [*outputs, *gradients.values()]

    harness.assert_same_bits(harness.under_every_schedule(run), "the order of lanes and blocks changes the result")


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_bits_do_not_depend_on_threads(approximate, bias, restore_threads):
    t = harness.cast(make((333, 211), bias), torch.float32)
    upstream = [torch.randn(333, 211)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(runner(approximate), "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


@pytest.mark.parametrize("approximate", FORMS)
def test_bits_do_not_depend_on_neighbours(isa, approximate):
    x = torch.randn(50, 77)
    whole = ops.gelu(x, approximate, backend="cpu")
    harness.assert_same_bits([[whole[31, 5:6]], [ops.gelu(x[31, 5:6], approximate, backend="cpu")]], "neighbours")


def test_float64_goes_to_the_reference_openly():
    x = torch.randn(2, 8, dtype=torch.float64)
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"gelu.*float64.*strict"):
        ops.gelu(x)
    with pytest.raises(NotImplementedError, match=r"backend='cpu' does not take dtype torch.float64"):
        ops.gelu(x, backend="cpu")
    assert torch.equal(ops.gelu(x), ops.gelu(x, backend="reference"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8).long()}, TypeError, r"gelu: input has dtype torch.int64; allowed are float32"),
        ({"input": [1.0]}, TypeError, r"input must be a Tensor, not list"),
        ({"approximate": "sigmoid"}, ValueError, r"approximate='sigmoid' is unknown; allowed are 'none', 'tanh'"),
        ({"bias": torch.ones(7)}, ValueError, r"bias has shape \(7,\); it must be \(8,\) \(input's last dimension\)"),
        ({"bias": torch.ones(8).half()}, TypeError, r"bias has dtype torch.float16; it must be torch.float32"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, r"bias is on meta, but input is on cpu"),
        ({"input": torch.tensor(1.0), "bias": torch.tensor(1.0)}, ValueError, r"bias needs an input of at least one"),
        (
            {"backend": "gpu"},
            ValueError,
            r"backend='gpu' is unknown; allowed are 'fused', 'reference', 'cpu'",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.gelu(**{"input": torch.ones(2, 8), **change})


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=4), approximate=st.sampled_from(FORMS), bias=st.booleans())
def test_any_shape(shape, approximate, bias):
    """Every element is computed, in its place. Not by the budget, which needs more than a handful of elements."""
    tensors = harness.cast(make(tuple(shape), bias and bool(shape)), torch.float32)
    upstream = [torch.randn(shape)]
    outputs, gradients = harness.run_with_gradients(runner(approximate), "cpu", tensors, upstream)
    expected, expected_gradients = harness.run_with_gradients(runner(approximate), "torch", tensors, upstream)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_narrow_bias_gradient(backend):
    x, bias, upstream = torch.randn(100_000, 3), torch.randn(3, requires_grad=True), torch.rand(100_000, 3)
    (gradient,) = torch.autograd.grad(ops.gelu(x, bias=bias, backend=backend), bias, upstream)
    exact = torch.nn.functional.gelu(x.double() + bias.double())
    (exact,) = torch.autograd.grad(exact, bias, upstream.double())
    torch.testing.assert_close(gradient, exact, rtol=4 * torch.finfo(torch.float32).eps, atol=0, check_dtype=False)
