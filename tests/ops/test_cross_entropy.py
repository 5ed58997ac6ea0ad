import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from fastgpt.ops.losses import check_targets
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("cross_entropy")
INF, NAN = math.inf, math.nan
# (rows, classes): one row, one class, odd sizes, several of the CPU kernel's blocks of 2048, around the widths where
# CUDA's takes more threads (4096 and 8192), GPT-2's vocabulary
SIZES = [(1, 1), (5, 1), (1, 7), (123, 123), (3, 2048), (2, 2049), (3, 6151), (2, 50257), (70, 16)]
SIZES += [(2, 4095), (2, 4096), (2, 4097), (2, 8191), (2, 8193)]
REDUCTIONS = ("none", "mean", "sum")


def targets(rows, classes, ignored=()):
    target = torch.randint(classes, (rows,))
    for row in ignored:
        target[row] = -100
    return target


def runner(target, **options):
    return lambda backend, input: ops.cross_entropy(input, target, backend=backend, **options)


def logits(*shape, scale=3.0):
    return {"input": (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, backend):
    harness.check(runner(targets(*size)), logits(*size), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_combination_of_options(reduction, dtype, backend):
    for ignored, smoothing, z_loss in itertools.product(((), (0, 4)), (0.0, 0.1, 1.0), (0.0, 1e-2)):
        run = runner(targets(9, 130, ignored), reduction=reduction, label_smoothing=smoothing, z_loss=z_loss)
        harness.check(run, logits(9, 130), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype):
    for size in [(5, 123), (3, 2049)]:
        for smoothing in (0.0, 0.2):
            harness.check(runner(targets(*size), label_smoothing=smoothing), logits(*size), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("input", "target"),
    [
        ((7,), ()),
        ((7,), (1,)),
        ((2, 7), (2,)),
        ((2, 7, 3), (2, 3)),
        ((2, 7, 3, 2, 2), (2, 3, 2, 2)),
        ((0, 7), (0,)),
        ((2, 7, 0), (2, 0)),
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_shape_that_torch_takes(input, target, reduction, backend):
    run = runner(torch.randint(7, target), reduction=reduction)
    backprops = len(target) < len(input)  # torch's own backward fails for logits (C,) with a target (1,)
    harness.check(run, logits(*input), torch.float32, backend, gradients=backprops)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    target = targets(6, 40)
    for _, view in harness.layouts(torch.randn(6, 40, dtype=torch.float64)):
        harness.check(runner(target), {"input": view.requires_grad_()}, torch.float32, backend)
    padded = torch.randn(6, 64)  # a padded vocabulary: rows further apart than they are long
    exact = F.cross_entropy(padded[:, :40].double(), target, reduction="none")
    view = ops.cross_entropy(padded[:, :40], target, reduction="none", backend=backend)
    harness.assert_within_budget("a view of padded rows", view, exact.float(), exact)
    one_row = padded[:1, :40].expand(6, 40)
    assert torch.equal(
        ops.cross_entropy(one_row, target, backend=backend), ops.cross_entropy(one_row.clone(), target, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-4, 1e-40])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_scales(scale, smoothing, backend):
    harness.check(
        runner(targets(8, 300), reduction="none", label_smoothing=smoothing),
        logits(8, 300, scale=scale),
        torch.float32,
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_a_large_offset_costs_no_accuracy(dtype, backend):
    tensors = logits(8, 5000, scale=1.0)
    with torch.no_grad():
        tensors["input"] += 8192
    harness.check(runner(targets(8, 5000), reduction="none", label_smoothing=0.1), tensors, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("position", [0, 2047, 2048, 4999])
@pytest.mark.parametrize("value", [-INF, INF, NAN])
def test_non_finite_logits_do_as_in_torch(value, position, smoothing, backend):
    tensors = logits(2, 5000)
    with torch.no_grad():
        tensors["input"][1, position] = value
    harness.check(
        runner(torch.tensor([17, 18]), reduction="none", label_smoothing=smoothing), tensors, torch.float32, backend
    )
    tensors["input"].requires_grad_(False)
    harness.check(runner(torch.tensor([17, position]), label_smoothing=smoothing), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_masked_vocabulary(backend):
    """Whole blocks of -inf before, between and after what is left; and a row where nothing is left."""
    tensors = logits(4, 9000)
    with torch.no_grad():
        tensors["input"][0, :8999] = -INF
        tensors["input"][1, 1:] = -INF
        tensors["input"][2, :4500] = -INF
        tensors["input"][3] = -INF
    target = torch.tensor([8999, 0, 7000, 1])
    harness.check(runner(target, reduction="none"), tensors, torch.float32, backend)
    loss = runner(target, reduction="none")(backend, tensors["input"].float())
    assert loss[:2].tolist() == [0.0, 0.0]
    assert loss[3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_ignored_rows_give_exact_zeros(value, reduction, backend):
    """Whatever the row holds; torch's gradient would be NaN for non-finite logits."""
    x = torch.randn(4, 100)
    x[2] = value
    x.requires_grad_()
    target = torch.tensor([3, 99, -100, 0])
    loss = ops.cross_entropy(x, target, reduction=reduction, label_smoothing=0.1, z_loss=0.1, backend=backend)
    loss.sum().backward()
    keep = [0, 1, 3]
    y = x.detach()[keep].requires_grad_()
    kept = ops.cross_entropy(y, target[keep], reduction=reduction, label_smoothing=0.1, z_loss=0.1, backend=backend)
    kept.sum().backward()
    assert torch.equal(x.grad[2], torch.zeros(100))
    torch.testing.assert_close(x.grad[keep], y.grad)
    torch.testing.assert_close(loss[keep] if reduction == "none" else loss, kept)
    if reduction == "none":
        assert loss[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 3, 1000, -1])
def test_ignore_index(ignore_index, backend):
    target = targets(60, 10)
    target[::7] = ignore_index
    for reduction in REDUCTIONS:
        run = runner(target, ignore_index=ignore_index, reduction=reduction)
        harness.check(run, logits(60, 10), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_the_mean_over_nothing_is_nan_with_zero_gradients(rows, backend):
    x = torch.randn(rows, 5, requires_grad=True)
    target = torch.full((rows,), -100)
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        loss = ops.cross_entropy(x, target, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isnan()
        assert torch.equal(gradient, torch.zeros(rows, 5))
        assert ops.cross_entropy(x, target, reduction="sum", backend=backend, **options) == 0
    assert F.cross_entropy(x, target).isnan()


def test_z_loss_is_the_square_of_logsumexp():
    x, target = torch.randn(6, 50, dtype=torch.float64), targets(6, 50, [1])
    plain = F.cross_entropy(x, target, reduction="none")
    z = 0.3 * torch.logsumexp(x, 1).square()
    z[1] = 0
    for backend in ("torch", "reference"):
        options = {"z_loss": 0.3, "backend": backend}
        torch.testing.assert_close(ops.cross_entropy(x, target, reduction="none", **options), plain + z)
        torch.testing.assert_close(ops.cross_entropy(x, target, reduction="sum", **options), (plain + z).sum())
        torch.testing.assert_close(ops.cross_entropy(x, target, **options), (plain + z).sum() / 5)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3), (6,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_weights_go_to_torch_openly(shape, reduction):
    x, weight = torch.randn(shape), torch.rand(6)
    target = torch.randint(6, (*shape[:1], *shape[2:]) if len(shape) > 1 else ())
    options = {"reduction": reduction, "label_smoothing": 0.1}
    expected = F.cross_entropy(x, target, weight, **options)
    assert torch.equal(ops.cross_entropy(x, target, weight, **options), expected)
    assert fastgpt.fallbacks()["cross_entropy", "class weights"] > 0
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"cross_entropy.*class weights"):
        ops.cross_entropy(x, target, weight)
    with pytest.raises(NotImplementedError, match=r"backend='cpu' does not take class weights"):
        ops.cross_entropy(x, target, weight, backend="cpu")
    classes = min(1, len(shape) - 1)
    z = 0.2 * x.logsumexp(classes).square()
    with_z = ops.cross_entropy(x, target, weight, z_loss=0.2, reduction=reduction)
    plain = F.cross_entropy(x, target, weight, reduction=reduction)
    expected_z = {"none": z, "sum": z.sum(), "mean": z.sum() / weight[target].sum()}[reduction]
    torch.testing.assert_close(with_z, plain + expected_z)


@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 3), (6,)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_class_probabilities_go_to_torch_openly(shape, reduction):
    x = torch.randn(shape, requires_grad=True)
    target = torch.randn(shape).softmax(min(1, len(shape) - 1)).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.1}
    loss = ops.cross_entropy(x, target, **options)
    assert torch.equal(loss, F.cross_entropy(x, target, **options))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss.sum(), (x, target)))
    assert fastgpt.fallbacks()["cross_entropy", "class-probability targets"] > 0
    z = 0.2 * x.logsumexp(min(1, len(shape) - 1)).square()
    with_z = ops.cross_entropy(x, target, z_loss=0.2, **options)
    torch.testing.assert_close(with_z, loss + (z if reduction == "none" else getattr(z, reduction)()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_byte_targets_and_other_integers(backend):
    x = torch.randn(4, 300)
    target = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)
    torch.testing.assert_close(ops.cross_entropy(x, target, backend=backend), F.cross_entropy(x, target.long()))
    with pytest.raises(TypeError, match=r"target has dtype torch.int32; class indices must be int64 or uint8"):
        ops.cross_entropy(x, target.int())


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_the_legacy_arguments(backend):
    x, target = torch.randn(3, 5), targets(3, 5)
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        if size_average is reduce is None:
            continue
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            ours = ops.cross_entropy(x, target, size_average=size_average, reduce=reduce, backend=backend)
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            theirs = F.cross_entropy(x, target, size_average=size_average, reduce=reduce)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck_of_the_formula(reduction, smoothing):
    target = targets(4, 6, [2])
    assert torch.autograd.gradcheck(
        lambda x: ops.cross_entropy(
            x, target, reduction=reduction, label_smoothing=smoothing, z_loss=0.1, backend="reference"
        ),
        (torch.randn(4, 6, dtype=torch.float64, requires_grad=True),),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_registration(reduction, backend):
    x, target = torch.randn(4, 9, requires_grad=True), targets(4, 9, [1])
    options = (reduction, -100, 0.1, 0.1, backend)
    harness.opcheck("cross_entropy", (x, target, *options))
    loss, *saved = harness.raw("cross_entropy", x.detach(), target, *options)
    harness.opcheck("cross_entropy_backward", (torch.randn_like(loss), x.detach(), target, *saved, *options))
    if reduction != "none":
        harness.opcheck("cross_entropy_gradients", (x.detach(), target, *options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_backward_of_a_retained_graph(reduction, dtype):
    """The first takes the gradient that the forward computed, the others compute it; by any factor that arrives."""
    target = targets(5, 3000, [2])
    x = (torch.randn(5, 3000) * 3).to(dtype).requires_grad_()
    loss = ops.cross_entropy(x, target, reduction=reduction, z_loss=1e-3, backend="cpu")
    gradients = [torch.autograd.grad(loss, x, torch.tensor(f, dtype=dtype), retain_graph=True)[0] for f in (1, 1, 2, 0)]
    again = ops.cross_entropy(x, target, reduction=reduction, z_loss=1e-3, backend="cpu")
    gradients.append(torch.autograd.grad(again, x, torch.tensor(2, dtype=dtype))[0])
    for factor, gradient in zip((1, 1, 2, 0, 2), gradients, strict=True):
        torch.testing.assert_close(gradient, gradients[0] * factor)
        assert not gradient[2].any()
    last = ops.cross_entropy(x, target, reduction=reduction, backend="cpu")
    (broken,) = torch.autograd.grad(last, x, torch.tensor(torch.inf, dtype=dtype))
    assert not broken[2].any()
    assert not broken[0].isfinite().all()


def test_maxima_in_every_block():
    """Rows that rise, fall and jump between blocks, so that what is subtracted changes on the way."""
    cols = 9000
    rising, steps = torch.arange(cols) / 100.0, (torch.arange(cols) // 2048) * 7.3
    x = torch.stack([rising, -rising, steps, -steps, steps.flip(0)]).double() + torch.randn(5, cols) * 0.1
    for smoothing in (0.0, 0.2):
        run = runner(targets(5, cols), label_smoothing=smoothing)
        harness.check(run, {"input": x.requires_grad_()}, torch.float32, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_breaks(backend):
    target = targets(4, 16)
    run = runner(target, label_smoothing=0.1)
    compiled = torch.compile(lambda input: run(backend, input), fullgraph=True, backend="aot_eager")
    t = harness.cast(logits(4, 16), torch.float32)
    upstream = [torch.randn(())]
    eager = harness.run_with_gradients(run, backend, t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), backend, t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_second_derivative(backend):
    x = torch.randn(2, 5, requires_grad=True)
    loss = ops.cross_entropy(x, targets(2, 5), backend=backend)
    with pytest.raises(NotImplementedError, match=r"cross_entropy: .*create_graph=True.*backend='torch'"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_bits_do_not_depend_on_threads(restore_threads):
    t = harness.cast(logits(333, 500), torch.float32)
    target = targets(333, 500, [5])
    upstream = [torch.randn(())]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(runner(target), "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


@pytest.mark.parametrize("backend", ["cpu", *harness.asynchronous_backends("cross_entropy")])
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("classes", [77, 9001])
def test_bits_do_not_depend_on_batch_neighbours(classes, dtype, backend):
    """Nor on where in the batch, and so at which address, a row lies."""
    x, target = (3 * torch.randn(9, classes)).to(dtype), targets(9, classes)
    run = runner(target, reduction="none", label_smoothing=0.1)
    whole, gradients = harness.run_with_gradients(run, backend, {"input": x.requires_grad_()}, [torch.ones(9)])
    for row in range(9):
        run = runner(target[row : row + 1], reduction="none", label_smoothing=0.1)
        one = x.detach()[row : row + 1].clone().requires_grad_()
        alone, gradient = harness.run_with_gradients(run, backend, {"input": one}, [torch.ones(1)])
        harness.assert_same_bits([[whole[0][row : row + 1]], alone], "neighbours matter to the loss")
        harness.assert_same_bits(
            [[gradients["input"][row]], [gradient["input"][0]]], "neighbours matter to the gradient"
        )


@pytest.mark.parametrize("backend", harness.asynchronous_backends("cross_entropy"))
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_rows_at_any_distance_from_aligned_memory(dtype, backend):
    """The same numbers, so the same bits: of the loss and, into memory aligned otherwise, of the gradient."""
    values, target = 3 * torch.randn(4, 517), targets(4, 517, [2])
    results = []
    for start, stride in [(0, 520), (0, 517), (1, 517), (3, 519), (5, 522), (7, 640)]:
        view = torch.empty(start + 4 * stride, dtype=dtype)[start:].as_strided((4, 517), (stride, 1))
        view.copy_(values)
        run = runner(target, reduction="none", label_smoothing=0.1, z_loss=1e-3)
        losses, gradients = harness.run_with_gradients(run, backend, {"input": view.requires_grad_()}, [torch.ones(4)])
        results.append([*losses, gradients["input"].contiguous()])
    harness.assert_same_bits(results, "the address matters")


def test_bits_do_not_depend_on_the_schedule(emulated_schedules):
    x, target = (3 * torch.randn(40, 515)).bfloat16(), targets(40, 515, [3])
    results = []
    for _ in emulated_schedules():
        t = {"input": x.clone().requires_grad_()}
        losses, gradients = harness.run_with_gradients(runner(target, z_loss=1e-3), "simt", t, [torch.ones(())])
        results.append([*losses, *gradients.values()])
    harness.assert_same_bits(results, "the order in which threads run changes the result")


def test_float64_goes_to_the_reference_openly():
    x, target = torch.randn(2, 8, dtype=torch.float64), targets(2, 8)
    torch.testing.assert_close(ops.cross_entropy(x, target), F.cross_entropy(x, target))
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"cross_entropy.*float64.*strict"):
        ops.cross_entropy(x, target)


@pytest.mark.parametrize("backend", harness.SYNCHRONOUS)
@settings(max_examples=40, deadline=None)
@given(target=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 12), min_size=1, max_size=5))
def test_targets_out_of_range_are_index_errors(backend, target):
    x, target = torch.randn(len(target), 10), torch.tensor(target)
    bad = [(row, value) for row, value in enumerate(target.tolist()) if not 0 <= value < 10 and value != -1]
    if not bad:
        ops.cross_entropy(x, target, ignore_index=-1, backend=backend)
        return
    row, value = bad[0]
    message = rf"target {value} in row {row} is out of bounds; allowed are 0 to 9 and ignore_index=-1"
    with pytest.raises(IndexError, match=message):
        ops.cross_entropy(x, target, ignore_index=-1, backend=backend)
    with pytest.raises(IndexError, match=message):
        check_targets("cross_entropy", target, 10, -1)


@pytest.mark.parametrize("backend", harness.asynchronous_backends("cross_entropy"))
@pytest.mark.parametrize("classes", [10, 9001])
@pytest.mark.parametrize("bad", [-1, 10**4, -(2**63), 2**63 - 1, 2**32 + 1])
def test_targets_out_of_range_are_nan_where_no_error_can_be_raised(bad, classes, backend):
    """The row's loss and gradient, and the mean; the other rows are as without it."""
    x, target = torch.randn(4, classes, requires_grad=True), torch.tensor([3, bad, -100, 0])
    loss = ops.cross_entropy(x, target, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    keep = torch.tensor([0, 2, 3])
    kept = ops.cross_entropy(x[keep], target[keep], reduction="none", backend=backend)
    (expected,) = torch.autograd.grad(kept.sum(), x)
    assert loss[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(loss[keep], kept)
    assert torch.equal(gradient[keep], expected[keep])
    for reduction in ("mean", "sum"):
        loss = ops.cross_entropy(x, target, reduction=reduction, backend=backend)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0][1].isnan().all()


@settings(max_examples=100, deadline=None)
@given(
    input=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    target=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_shape_is_taken_or_refused_as_torch_does(input, target, reduction):
    x, t = torch.randn(input), torch.zeros(target, dtype=torch.int64)
    classes = input[min(1, len(input) - 1)] if input else 0
    try:
        expected = F.cross_entropy(x, t, reduction=reduction)
    except (RuntimeError, ValueError, IndexError):
        expected = None
    if expected is None or not classes:
        with pytest.raises((ValueError, TypeError), match=r"cross_entropy: (target|input|the logits) ha"):
            ops.cross_entropy(x, t, reduction=reduction)
    else:
        torch.testing.assert_close(ops.cross_entropy(x, t, reduction=reduction), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"input has dtype torch.int64; allowed are"),
        ({"input": [1.0]}, TypeError, r"input must be a Tensor, not list"),
        ({"target": 3}, TypeError, r"target must be a Tensor, not int"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\); .* must be \(2,\)"),
        ({"target": torch.zeros(2)}, TypeError, r"target has dtype torch.float32; class indices must be int64"),
        ({"target": torch.zeros(2, 8).long()}, TypeError, r"dtype is torch.int64; it must be floating"),
        ({"target": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, r"target is on meta, but input"),
        ({"target": torch.rand(2, 8), "ignore_index": 1}, ValueError, r"ignore_index=1 means nothing"),
        ({"input": torch.ones(2, 0)}, ValueError, r"which has no classes"),
        ({"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\); it must be \(8,\)"),
        ({"weight": torch.ones(8).double()}, TypeError, r"weight has dtype torch.float64"),
        ({"reduction": "avg"}, ValueError, r"reduction='avg' is unknown; allowed are 'none', 'mean', 'sum'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing=1.5 must lie in \[0, 1\]"),
        ({"label_smoothing": NAN}, ValueError, r"label_smoothing=nan"),
        ({"z_loss": -1.0}, ValueError, r"z_loss=-1.0 must be a finite number >= 0"),
        ({"z_loss": INF}, ValueError, r"z_loss=inf"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.cross_entropy(**{"input": torch.ones(2, 8), "target": torch.zeros(2, dtype=torch.int64), **change})
