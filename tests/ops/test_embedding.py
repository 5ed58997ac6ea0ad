import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("embedding")
# (input's shape, V, C, P)
SHAPES = [
    ((5, 41), 123, 123, 50),
    ((3, 17), 11, 768, 17),
    ((1, 1), 1, 1, 1),
    ((2, 3, 5), 7, 33, 9),
    ((9,), 20, 130, 12),
]


def make(shape, vocabulary, width, positions=None, index=torch.int64):
    tensors = {
        "input": torch.randint(0, vocabulary, shape, dtype=index),
        "weight": torch.randn(vocabulary, width, dtype=torch.float64).requires_grad_(),
    }
    if positions is not None:
        tensors["position_weight"] = torch.randn(positions, width, dtype=torch.float64).requires_grad_()
    return tensors


def runner(offset=0, **options):
    def run(backend, **t):
        position = {"position_offset": offset} if "position_weight" in t else {}
        return ops.embedding(**t, **position, **options, backend=backend)

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, index, dtype, backend):
    shape, vocabulary, width, positions = shape
    harness.check(runner(), make(shape, vocabulary, width, None, index), dtype, backend)
    spare = positions - shape[-1]
    harness.check(runner(spare), make(shape, vocabulary, width, positions, index), dtype, backend)
    if len(shape) > 1:
        offsets = torch.randint(0, spare + 1, shape[:1])
        harness.check(runner(offsets), make(shape, vocabulary, width, positions, index), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype):
    for width in (1, 30, 200):
        harness.check(runner(2), make((4, 9), 13, width, 12), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1, -6])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_padding_and_frequency(padding_idx, by_frequency, backend):
    run = runner(1, padding_idx=padding_idx, scale_grad_by_freq=by_frequency)
    harness.check(run, make((4, 9), 6, 20, 10), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_padding_row_is_zero(backend):
    weight = torch.randn(5, 8, requires_grad=True)
    ops.embedding(torch.tensor([1, 3, 3, 4]), weight, -2, backend=backend).sum().backward()
    assert torch.equal(weight.grad.sum(1), torch.tensor([0.0, 8, 0, 0, 8]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_max_norm_scales_the_weight_in_place(norm_type, backend):
    tokens, weight = torch.tensor([[1, 3], [3, 0]]), torch.randn(5, 8)
    expected_weight = weight.clone()
    expected = F.embedding(tokens, expected_weight, None, 0.7, norm_type)
    assert torch.equal(ops.embedding(tokens, weight, None, 0.7, norm_type, backend=backend), expected)
    assert torch.equal(weight, expected_weight)
    assert weight[1].norm(norm_type) <= 0.7 + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    for _, view in harness.layouts(torch.randn(12, 40, dtype=torch.float64)):
        tensors = {**make((3, 7), 12, 40, 12), "weight": view.detach().requires_grad_()}
        harness.check(runner(), tensors, torch.float32, backend)
        tensors = {**make((3, 7), 12, 40, 12), "position_weight": view.detach().requires_grad_()}
        harness.check(runner(), tensors, torch.float32, backend)
    tensors = {**make((3, 7), 12, 40, 12), "input": torch.randint(0, 12, (7, 3)).T}
    harness.check(runner(torch.tensor([0, 5, 1, 2])[::2][:1].expand(3)), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_gradient(backend):
    tokens, weight = torch.randint(0, 9, (4, 6)), torch.randn(9, 10, requires_grad=True)
    upstream = torch.randn(10, 6, 4).permute(2, 1, 0)
    (ours,) = torch.autograd.grad(ops.embedding(tokens, weight, backend=backend), weight, upstream)
    (expected,) = torch.autograd.grad(F.embedding(tokens, weight), weight, upstream)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 1e-40])
def test_extreme_scales(scale, backend):
    tensors = make((4, 9), 6, 20, 10)
    with torch.no_grad():
        tensors["weight"] *= scale
        tensors["position_weight"] *= scale
    harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_gradients_are_summed_in_float32(backend):
    tokens, weight = torch.zeros(4096, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.embedding(tokens, weight, backend=backend).sum(), weight)
    assert torch.equal(gradient[0], torch.full((8,), 4096, dtype=torch.bfloat16)), backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "vocabulary", "width"), [((0, 4), 5, 6), ((3, 0), 5, 6), ((2, 3), 5, 0), ((0,), 0, 3)]
)
def test_empty(shape, vocabulary, width, backend):
    tensors = make((1,), 1, 1)
    tensors["input"] = torch.zeros(shape, dtype=torch.int64)
    tensors["weight"] = torch.randn(vocabulary, width, dtype=torch.float64).requires_grad_()
    harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token(backend):
    harness.check(runner(), make((), 5, 6), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["weight", "position_weight"])
def test_only_one_gradient_is_wanted(wanted, backend):
    tensors = make((3, 4), 5, 6, 4)
    for name in ("weight", "position_weight"):
        tensors[name].requires_grad_(name == wanted)
    harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("offset", [2, torch.tensor([0, 4])])
def test_gradcheck_of_the_formula(offset):
    t = make((2, 3), 5, 4, 7)
    assert torch.autograd.gradcheck(
        lambda weight, position: runner(offset)("reference", input=t["input"], weight=weight, position_weight=position),
        (t["weight"], t["position_weight"]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    tokens, weight, position = torch.randint(0, 7, (2, 5)), torch.randn(7, 6), torch.randn(9, 6)
    for starts in (None, torch.tensor([1, 3])):
        arguments = (tokens, weight.requires_grad_(), position.requires_grad_(), starts, 2, 3, False, backend)
        harness.opcheck("embedding", arguments)
        harness.opcheck("embedding_backward", (torch.randn(2, 5, 6), tokens, starts, 2, 7, 9, 3, True, backend))
    harness.opcheck("embedding", (tokens, weight, None, None, 0, -1, False, backend))
    harness.opcheck("embedding_backward", (torch.randn(2, 5, 6), tokens, None, 0, 7, -1, -1, False, backend))


def test_compiles_without_graph_breaks():
    t = harness.cast(make((4, 9), 13, 16, 12), torch.float32)
    run = runner(2)
    compiled = torch.compile(lambda **t: run("cpu", **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(4, 9, 16)]
    eager = harness.run_with_gradients(run, "cpu", t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


def text(*shape, vocabulary):
    """Tokens of which a few make up most, as in text."""
    return (torch.rand(shape) ** 4 * vocabulary).long()


# CUDA sorts tiles of 2048 tokens by 8 bits a pass, and cuts rows of more than 128 tokens into pieces.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize(
    ("tokens", "vocabulary"),
    [
        (torch.zeros(1, 2500), 1),
        (torch.full((3, 700), 255), 256),
        (torch.full((2, 129), 256), 257),
        (torch.full((1, 128), 3), 700),
        (torch.arange(4300) % 3 * 300, 800),
    ],
)
def test_many_tokens_of_one_row(tokens, vocabulary, dtype, backend):
    for width in (8, 5):
        tensors = make((1,), vocabulary, width)
        harness.check(runner(), {**tensors, "input": tokens.long()}, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("vocabulary", "length"), [(255, 1), (255, 4500), (256, 2047), (256, 4500), (300, 2049), (65535, 2049), (65536, 9)]
)
def test_the_gradient_is_the_sum_over_the_tokens(vocabulary, length, backend):
    """Of small integers: exact in any order."""
    tokens = text(1, length, vocabulary=vocabulary)
    tokens[0, -1] = vocabulary - 1
    upstream = torch.randint(-3, 4, (1, length, 4)).float()
    weight, position = torch.zeros(vocabulary, 4, requires_grad=True), torch.zeros(length + 3, 4, requires_grad=True)
    y = ops.embedding(
        tokens, weight, position_weight=position, position_offset=torch.tensor([2]), padding_idx=0, backend=backend
    )
    dweight, dposition = torch.autograd.grad(y, (weight, position), upstream)
    expected = torch.zeros(vocabulary, 4).index_add_(0, tokens[0], upstream[0])
    expected[0] = 0
    assert torch.equal(dweight, expected)
    assert torch.equal(dposition[2 : length + 2], upstream[0])
    assert not dposition[:2].any()
    assert not dposition[length + 2 :].any()


def test_bits_do_not_depend_on_the_schedule(emulated_schedules):
    t = harness.cast(make((1,), 300, 24, 120), torch.bfloat16)
    t["input"] = text(30, 100, vocabulary=300)
    upstream, starts = [torch.randn(30, 100, 24)], torch.randint(0, 20, (30,))
    results = []
    for _ in emulated_schedules():
        outputs, gradients = harness.run_with_gradients(runner(starts), "simt", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the order in which threads run changes the result")


def test_bits_do_not_depend_on_threads(restore_threads):
    t = harness.cast(make((8, 100), 300, 200, 120), torch.float32)
    t["input"] = text(8, 100, vocabulary=300)
    upstream = [torch.randn(8, 100, 200)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(runner(7), "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


def test_float64_goes_to_the_reference_openly():
    t = make((2, 3), 5, 4)
    ops.embedding(**t)
    assert any(name == "embedding" and "float64" in why for name, why in fastgpt.fallbacks())
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"embedding.*float64"):
        ops.embedding(**t)


@pytest.mark.parametrize("backend", harness.backends_here("embedding"))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": 4}, {"scale_grad_by_freq": True}], ids=str)
def test_a_sparse_gradient_is_the_dense_one(backend, dtype, options):
    device = harness.device(backend)
    tokens = torch.tensor([[6, 2, 6, 1], [2, 6, 0, 3]], dtype=dtype, device=device)
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        weight, positions = (torch.randn(rows, 40).to(device).requires_grad_() for rows in (8, 6))
        y = ops.embedding(tokens, weight, **options, sparse=sparse, position_weight=positions, backend=backend)
        found.append((y, *torch.autograd.grad(y, (weight, positions), torch.randn_like(y))))
    (y, dense, dense_positions), (sparse_y, sparse, sparse_positions) = found
    assert torch.equal(y, sparse_y)
    assert torch.equal(dense_positions, sparse_positions)
    assert sparse.is_sparse
    assert sparse.is_coalesced()
    assert sparse.indices()[0].tolist() == [0, 1, 2, 3, 6]
    assert torch.equal(sparse.to_dense(), dense)


def test_a_sparse_gradient_with_nothing_else_wanted():
    tokens, weight = torch.tensor([1, 2]), torch.randn(5, 3, requires_grad=True)
    ops.embedding(tokens, weight, sparse=True, backend="torch").sum().backward()
    theirs, weight.grad = weight.grad, None
    ops.embedding(tokens, weight, sparse=True).sum().backward()
    assert theirs.is_sparse
    assert torch.equal(weight.grad.to_dense(), theirs.to_dense())
    with torch.no_grad():
        assert torch.equal(ops.embedding(tokens, weight, sparse=True), weight[tokens])
    positions = torch.randn(2, 3, requires_grad=True)
    ops.embedding(tokens, weight.detach(), sparse=True, position_weight=positions).sum().backward()
    assert torch.equal(positions.grad, torch.ones(2, 3))


def test_a_sparse_gradient_cannot_be_compiled():
    weight = torch.randn(5, 3, requires_grad=True)
    compiled = torch.compile(lambda t: ops.embedding(t, weight, sparse=True), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"sparse=True, whose gradient has no fixed size, cannot be compiled"):
        compiled(torch.tensor([1, 2]))


# --- errors ---

TOKENS, WEIGHT, POSITIONS = torch.tensor([[1, 2, 4], [0, 0, 3]]), torch.ones(5, 6), torch.ones(4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": TOKENS.float()}, TypeError, r"input has dtype torch.float32; .*int64 or int32"),
        ({"input": [1, 2]}, TypeError, r"input has type list"),
        ({"input": TOKENS.to("meta")}, ValueError, r"input is on meta, but weight is on cpu"),
        ({"weight": WEIGHT[0]}, ValueError, r"weight has shape \(6,\); it must be \(V, C\)"),
        ({"weight": WEIGHT.long()}, TypeError, r"weight has dtype torch.int64"),
        ({"padding_idx": 5}, ValueError, r"padding_idx=5; it must be in \[-5, 5\)"),
        ({"padding_idx": -6}, ValueError, r"padding_idx=-6"),
        ({"position_weight": POSITIONS[:, :3]}, ValueError, r"position_weight has shape \(4, 3\); .*\(P, 6\)"),
        ({"position_weight": POSITIONS.half()}, TypeError, r"position_weight has dtype torch.float16"),
        ({"position_offset": 2}, ValueError, r"position_offset is given without position_weight"),
        (
            {"position_weight": POSITIONS, "position_offset": 2},
            IndexError,
            r"position_offset=2 asks for positions 2 to 4; position_weight has positions 0 to 3",
        ),
        (
            {"position_weight": POSITIONS, "position_offset": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"position_offset has shape \(3,\); it must be \(2,\)",
        ),
        ({"position_weight": POSITIONS, "input": torch.tensor(1)}, ValueError, r"position_weight needs \(\.\.\., T\)"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=rf"embedding: .*{message}"):
        ops.embedding(**{"input": TOKENS, "weight": WEIGHT, **change})


@pytest.mark.parametrize("backend", harness.SYNCHRONOUS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_indices_out_of_range(index, backend):
    tokens = TOKENS.to(index)
    with pytest.raises(IndexError, match=r"embedding: input\[0, 2\] is 4; weight has tokens 0 to 3"):
        ops.embedding(tokens, WEIGHT[:4], backend=backend)
    with pytest.raises(IndexError, match=r"embedding: input\[1, 0\] is -7; weight has tokens 0 to 4"):
        ops.embedding(torch.where(TOKENS == 0, -7, TOKENS).to(index), WEIGHT, backend=backend)
    with pytest.raises(IndexError, match=r"embedding: input is 9; weight has tokens 0 to 4"):
        ops.embedding(torch.tensor(9, dtype=index), WEIGHT, backend=backend)
    options = {"position_weight": POSITIONS, "position_offset": torch.tensor([1, 2]), "backend": backend}
    with pytest.raises(IndexError, match=r"position_offset\[1\]=2 asks for positions 2 to 4; position_weight has"):
        ops.embedding(tokens, WEIGHT, **options)


@pytest.mark.parametrize("backend", harness.asynchronous_backends("embedding"))
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_indices_out_of_range_are_nan_where_no_error_can_be_raised(index, backend):
    """In the result; the gradients leave them out."""
    for bad in (5, -1, 2**31 - 1, *([2**32 + 1, -(2**63), 2**63 - 1] if index == torch.int64 else [])):
        tokens = TOKENS.to(index).masked_fill(TOKENS == 4, bad)
        weight, position = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
        offsets = torch.tensor([0, 2])  # positions 2, 3 and 4, of which the last is out of range
        y = ops.embedding(tokens, weight, position_weight=position, position_offset=offsets, backend=backend)
        wrong = torch.tensor([[False, False, True], [False, False, True]])
        assert torch.equal(y.isnan().all(-1), wrong)
        assert y[~wrong].isfinite().all()
        upstream = torch.randn(2, 3, 6)
        dweight, dposition = torch.autograd.grad(y, (weight, position), upstream)
        expected = torch.zeros(5, 6).index_add_(
            0, tokens.flatten()[[0, 1, 3, 4, 5]].long(), upstream.flatten(0, 1)[[0, 1, 3, 4, 5]]
        )
        torch.testing.assert_close(dweight, expected)
        at = torch.tensor([0, 1, 2, 2, 3])
        torch.testing.assert_close(dposition, torch.zeros(4, 6).index_add_(0, at, upstream.flatten(0, 1)[:5]))
    for far in (-1, 4, 2**63 - 1, -(2**63)):
        offsets = torch.tensor([0, far])
        y = ops.embedding(TOKENS, WEIGHT, position_weight=POSITIONS, position_offset=offsets, backend=backend)
        assert y[0].isfinite().all()
        assert y[1, 1:].isnan().all() or far == -1
        assert y[1].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    vocabulary=st.integers(1, 5),
    width=st.integers(0, 20),
    padding=st.none() | st.integers(-6, 5),
    by_frequency=st.booleans(),
    data=st.data(),
)
def test_any_call_is_answered_as_torch_does(shape, vocabulary, width, padding, by_frequency, data):
    highest = vocabulary if data.draw(st.booleans()) else vocabulary - 1  # vocabulary itself is out of range
    tokens = torch.randint(0, highest + 1, shape)
    weights = [torch.randn(vocabulary, width, requires_grad=True)]
    weights.append(weights[0].detach().clone().requires_grad_())
    try:
        expected = F.embedding(tokens, weights[0], padding, scale_grad_by_freq=by_frequency)
    except (AssertionError, IndexError, RuntimeError):  # a width of 0 makes it a RuntimeError
        with pytest.raises((ValueError, IndexError), match=r"padding_idx=|weight has tokens"):
            ops.embedding(tokens, weights[1], padding, scale_grad_by_freq=by_frequency, backend="cpu")
        return
    actual = ops.embedding(tokens, weights[1], padding, scale_grad_by_freq=by_frequency, backend="cpu")
    assert torch.equal(actual, expected)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    torch.testing.assert_close(weights[1].grad, weights[0].grad)
