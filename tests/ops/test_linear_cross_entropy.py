import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("linear_cross_entropy")
REDUCTIONS = ("none", "mean", "sum")
module = sys.modules["fastgpt.ops.linear_cross_entropy"]  # in the package, the name is the function's


def make(rows, features, classes, bias=True):
    tensors = {
        "input": torch.randn(rows, features, dtype=torch.float64),
        "linear_weight": torch.randn(classes, features, dtype=torch.float64) * 3 / features**0.5,
    }
    if bias:
        tensors["linear_bias"] = torch.randn(classes, dtype=torch.float64)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def targets(rows, classes, ignored=()):
    target = torch.randint(classes, (rows,))
    for row in ignored:
        target[row] = -100
    return target


def runner(target, **options):
    return lambda backend, **t: ops.linear_cross_entropy(
        t["input"], t["linear_weight"], target, linear_bias=t.get("linear_bias"), backend=backend, **options
    )


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks for logits of a few thousand elements, and several blocks of classes."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1024)
    monkeypatch.setattr(module, "CLASS_BLOCK", 50)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 5, 7), (123, 41, 123), (9, 64, 2049), (2, 16, 50257), (70, 48, 16)])
def test_values_and_gradients(size, dtype, backend):
    rows, _, classes = size
    harness.check(runner(targets(rows, classes)), make(*size), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 8, 30, 61])
def test_chunks(rows, reduction, dtype, small_chunks):
    tensors = make(rows, 24, 130)
    assert module.chunk_rows(rows, tensors["linear_weight"].to(dtype)) == {1: 1, 8: 4, 30: 6, 61: 7}[rows]
    harness.check(runner(targets(rows, 130), reduction=reduction), tensors, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_of_half_precision_add_up_accurately(dtype, small_chunks):
    harness.check(runner(targets(600, 130), reduction="sum"), make(600, 8, 130), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_combination_of_options(reduction, dtype, backend, small_chunks):
    for ignored, smoothing, z_loss, bias in itertools.product(((), (0, 4, 29)), (0.0, 0.1), (0.0, 1e-2), (True, False)):
        run = runner(targets(30, 99, ignored), reduction=reduction, label_smoothing=smoothing, z_loss=z_loss)
        harness.check(run, make(30, 24, 99, bias), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype, small_chunks):
    for reduction in REDUCTIONS:
        run = runner(targets(20, 123, (3,)), reduction=reduction, label_smoothing=0.1)
        harness.check(run, make(20, 32, 123), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_the_gradients_that_are_wanted(reduction, wanted, backend, small_chunks):
    tensors = make(20, 8, 60)
    for tensor, want in zip(tensors.values(), wanted, strict=True):
        tensor.requires_grad_(want)
    harness.check(runner(targets(20, 60, [2]), reduction=reduction), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(8,), (5, 8), (0, 8), (2, 5, 8), (2, 3, 2, 8)])
def test_shapes_of_the_input(shape, reduction, backend):
    tensors = {**make(1, 8, 11), "input": torch.randn(shape, dtype=torch.float64, requires_grad=True)}
    target = torch.randint(11, shape[:-1])
    harness.check(runner(target, reduction=reduction), tensors, torch.float32, backend)
    if hasattr(F, "linear_cross_entropy") and len(shape) <= 2:
        t = harness.cast(tensors, torch.float32)
        arguments = (t["input"], t["linear_weight"], target)
        theirs = F.linear_cross_entropy(*arguments, linear_bias=t["linear_bias"], reduction=reduction)
        ours = ops.linear_cross_entropy(*arguments, linear_bias=t["linear_bias"], reduction=reduction, backend=backend)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend, small_chunks):
    target = targets(12, 40)
    for _, x in harness.layouts(torch.randn(12, 24, dtype=torch.float64)):
        for _, w in harness.layouts(torch.randn(40, 24, dtype=torch.float64)):
            tensors = {"input": x.requires_grad_(), "linear_weight": w.requires_grad_()}
            harness.check(runner(target), tensors, torch.float32, backend)
    everyone = {"linear_weight": torch.randn(40, 24), "input": torch.randn(1, 24).expand(12, 24)}
    expected = F.cross_entropy(F.linear(everyone["input"], everyone["linear_weight"]), target)
    torch.testing.assert_close(runner(target)(backend, **everyone), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_large_bias_costs_no_accuracy(backend):
    tensors = make(10, 8, 200)
    with torch.no_grad():
        tensors["linear_bias"] += 8192
    harness.check(runner(targets(10, 200), reduction="none"), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_vocabulary_masked_by_the_bias(reduction, backend):
    tensors = make(10, 8, 200)
    with torch.no_grad():
        tensors["linear_bias"][50:] = -torch.inf
    harness.check(runner(targets(10, 50), reduction=reduction), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 4])
def test_no_row_counts(rows, reduction, backend):
    t = harness.cast(make(rows, 6, 9), torch.float32)
    loss = runner(torch.full((rows,), -100), reduction=reduction)(backend, **t)
    gradients = torch.autograd.grad(loss.sum(), list(t.values()))
    assert loss.isnan() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_give_exact_zeros(backend, small_chunks):
    t = harness.cast(make(20, 6, 99), torch.float32)
    with torch.no_grad():
        t["input"][3] = torch.nan
    for reduction in REDUCTIONS:
        loss = runner(targets(20, 99, [3]), reduction=reduction)(backend, **t)
        if backend != "reference":  # the rows are left out; the reference multiplies their NaN by zero, as torch does
            gradients = torch.autograd.grad(loss.sum(), list(t.values()))
            assert torch.equal(gradients[0][3], torch.zeros(6))
            assert all(g.isfinite().all() for g in gradients)
        assert loss.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_through_a_retained_graph(reduction, backend, small_chunks):
    """The first backward gives its gradients away; the next ones compute them again."""
    t = harness.cast(make(20, 6, 99), torch.float32)
    loss = runner(targets(20, 99, [7]), reduction=reduction)(backend, **t)
    upstream = torch.randn_like(loss)
    once, twice, thrice = (
        torch.autograd.grad(loss, list(t.values()), factor * upstream, retain_graph=True) for factor in (1, 2, 0.5)
    )
    for first, second, third in zip(once, twice, thrice, strict=True):
        torch.testing.assert_close(second, 2 * first)
        torch.testing.assert_close(third, 0.5 * first)


def test_gradients_accumulate_over_retained_graphs(small_chunks):
    t = harness.cast(make(20, 6, 99), torch.float32)
    loss = runner(targets(20, 99))("cpu", **t)
    (expected,) = torch.autograd.grad(loss, t["linear_weight"], retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(t["linear_weight"].grad, 3 * expected)


def test_nothing_but_the_loss_is_computed_without_gradients(monkeypatch):
    def refuse(*_):
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(module, "_Gradients", refuse)
    t = harness.cast(make(5, 6, 9), torch.float32)
    with torch.no_grad():
        runner(targets(5, 9))("cpu", **t)
    runner(targets(5, 9))("cpu", **{name: tensor.detach() for name, tensor in t.items()})
    runner(targets(5, 9), reduction="none")("cpu", **t)
    with pytest.raises(AssertionError, match="gradients were computed"):
        runner(targets(5, 9))("cpu", **t)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_the_formula(reduction):
    target = targets(4, 6, [2])
    tensors = make(4, 3, 6)
    assert torch.autograd.gradcheck(
        lambda *values: runner(target, reduction=reduction, label_smoothing=0.1, z_loss=0.1)(
            "reference", **dict(zip(tensors, values, strict=True))
        ),
        tuple(tensors.values()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_registration(reduction, backend, small_chunks):
    x, w, b = harness.cast(make(12, 5, 99), torch.float32).values()
    target, options = targets(12, 99, [1]), (reduction, -100, 0.1, 0.1)
    harness.opcheck("linear_cross_entropy", (x, w, b, target, *options, backend))
    x, w, b = x.detach(), w.detach(), b.detach()
    loss, *saved = harness.raw("linear_cross_entropy", x, w, b, target, *options, backend)
    for wanted in ([True, True, True], [False, True, False]):
        upstream = torch.randn_like(loss)
        harness.opcheck("linear_cross_entropy_backward", (upstream, x, w, b, target, *saved, *options, wanted, backend))
        if reduction != "none":
            harness.opcheck("linear_cross_entropy_gradients", (x, w, None, target, *options, wanted, backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_without_graph_breaks(reduction, backend):
    target = targets(6, 16)
    run = runner(target, reduction=reduction, label_smoothing=0.1)
    compiled = torch.compile(lambda **t: run(backend, **t), fullgraph=True, backend="aot_eager")
    t = harness.cast(make(6, 4, 16), torch.float32)
    upstream = [torch.randn(6 if reduction == "none" else ())]
    eager = harness.run_with_gradients(run, backend, t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), backend, t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


@pytest.mark.slow
def test_compiles_with_inductor():
    target = targets(6, 16)
    run = runner(target, label_smoothing=0.1)
    compiled = torch.compile(lambda **t: 2 * run("cpu", **t), fullgraph=True)
    t = harness.cast(make(6, 4, 16), torch.float32)
    eager = harness.run_with_gradients(run, "cpu", t, [torch.tensor(2.0)])[1]
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, [torch.tensor(1.0)])[1]
    for name, gradient in eager.items():
        torch.testing.assert_close(graph[name], gradient)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(reduction, backend):
    t = harness.cast(make(4, 3, 6), torch.float32)
    loss = runner(targets(4, 6), reduction=reduction)(backend, **t).sum()
    with pytest.raises(NotImplementedError, match=r"linear_cross_entropy: .*create_graph=True"):
        torch.autograd.grad(loss, list(t.values()), create_graph=True)


def test_what_is_ours_does_not_depend_on_threads(restore_threads, small_chunks):
    """The GEMMs are torch's. With one input feature and small integers they are exact: what differs would be ours."""
    w, x = torch.randint(-4, 5, (500, 1)).float().requires_grad_(), torch.ones(40, 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = ops.linear_cross_entropy(x, w, torch.arange(40), reduction="none", z_loss=0.1, backend="cpu")
        results.append([loss.detach()])
    harness.assert_same_bits(results, "the thread count changes the loss")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_rest_goes_to_torch_openly(reduction):
    x, w, target = torch.randn(4, 5), torch.randn(6, 5), targets(4, 6)
    logits = F.linear(x, w)
    probabilities = torch.rand(4, 6)
    deep, deep_target = torch.randn(6, 3, 2, 5), torch.randint(6, (4, 3, 2))
    deep_bias = torch.randn(6, 3, 2)
    deep_logits = (F.linear(x, deep.reshape(-1, 5)) + deep_bias.reshape(-1)).reshape(4, 6, 3, 2)
    cases = {
        "class weights": ((x, w, target), {"weight": torch.rand(6)}, logits, target),
        "class-probability targets": ((x, w, probabilities), {}, logits, probabilities),
        "linear_weight of more than 2 dimensions": (
            (x, deep, deep_target),
            {"linear_bias": deep_bias},
            deep_logits,
            deep_target,
        ),
    }
    for reason, (arguments, options, whole, t) in cases.items():
        expected = F.cross_entropy(whole, t, options.get("weight"), reduction=reduction, label_smoothing=0.1)
        ours = ops.linear_cross_entropy(*arguments, reduction=reduction, label_smoothing=0.1, **options)
        torch.testing.assert_close(ours, expected)
        assert fastgpt.fallbacks()["linear_cross_entropy", reason] > 0
        with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=reason):
            ops.linear_cross_entropy(*arguments, **options)
        if hasattr(F, "linear_cross_entropy"):
            theirs = F.linear_cross_entropy(*arguments, reduction=reduction, label_smoothing=0.1, **options)
            torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch is older than 2.13")
def test_torchs_chunking_options_change_nothing():
    t = harness.cast(make(8, 5, 30), torch.float32)
    target = targets(8, 30)
    options = torch.nn.LinearCrossEntropyOptions()
    with_options = runner(target, options=options)("cpu", **t)
    assert torch.equal(with_options, runner(target)("cpu", **t))


@pytest.mark.parametrize("backend", harness.SYNCHRONOUS)
@settings(max_examples=20, deadline=None)
@given(target=st.lists(st.integers(-3, 12), min_size=1, max_size=5))
def test_targets_out_of_range_are_index_errors(backend, target):
    t = harness.cast(make(len(target), 3, 10), torch.float32)
    run = runner(torch.tensor(target), ignore_index=-1)
    bad = [(row, value) for row, value in enumerate(target) if not 0 <= value < 10 and value != -1]
    if not bad:
        assert run(backend, **t).shape == ()
        return
    row, value = bad[0]
    with pytest.raises(
        IndexError, match=rf"linear_cross_entropy: target {value} in row {row} is out of bounds; .* 0 to 9"
    ):
        run(backend, **t)


@pytest.mark.parametrize("backend", harness.asynchronous_backends("linear_cross_entropy"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_targets_out_of_range_are_nan_where_no_error_can_be_raised(reduction, backend, small_chunks):
    t = harness.cast(make(20, 6, 99), torch.float32)
    target = targets(20, 99, [2])
    target[11] = 99
    loss = runner(target, reduction=reduction)(backend, **t)
    gradients = dict(zip(t, torch.autograd.grad(loss.sum(), list(t.values())), strict=True))
    bad = torch.arange(20) == 11
    if reduction == "none":
        assert torch.equal(loss.isnan(), bad)
    else:
        assert loss.isnan()
    assert gradients["input"][bad].isnan().all()
    assert gradients["linear_weight"].isnan().all()  # every class has a part of that row
    if reduction != "mean":
        assert gradients["input"][~bad].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8).int()}, TypeError, r"input has dtype torch.int32"),
        ({"linear_weight": torch.ones(5, 8).bfloat16()}, TypeError, r"linear_weight has dtype torch.bfloat16"),
        ({"linear_weight": torch.ones(5, 7)}, ValueError, r"linear_weight has shape \(5, 7\)"),
        ({"linear_weight": torch.ones(8)}, ValueError, r"linear_weight has shape \(8,\)"),
        ({"linear_weight": torch.ones(0, 8)}, ValueError, r"has no classes"),
        ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias has shape \(4,\); it must be \(5,\)"),
        ({"linear_bias": torch.ones(5).double()}, TypeError, r"linear_bias has dtype torch.float64"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target has shape \(3,\); .* must be \(2,\)"),
        ({"target": torch.zeros(2)}, TypeError, r"target has dtype torch.float32"),
        ({"target": [0, 1]}, TypeError, r"target must be a Tensor, not list"),
        ({"target": torch.rand(2, 5), "ignore_index": 3}, ValueError, r"ignore_index=3 means nothing"),
        ({"input": torch.ones(2, 1, 8)}, ValueError, r"target is \(2,\); .* class indices of shape \(2, 1\)"),
        (
            {"input": torch.ones(8), "linear_weight": torch.ones(5, 3, 8)},
            ValueError,
            r"input has shape \(8,\); .* must be \(N, 8\)",
        ),
        ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\); it must be \(5,\)"),
        ({"reduction": "max"}, ValueError, r"reduction='max' is unknown"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing=-0.1 must lie in \[0, 1\]"),
        ({"z_loss": -1e-4}, ValueError, r"z_loss=-0.0001 must be a finite number"),
        ({"options": "fast"}, TypeError, r"options must be torch.nn.LinearCrossEntropyOptions, not str"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"input": torch.ones(2, 8), "linear_weight": torch.ones(5, 8), "target": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(**{**arguments, **change})
