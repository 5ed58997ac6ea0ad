import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("rotary")
# (B, H, T, D, R)
SHAPES = [
    (5, 3, 41, 64, 64),
    (2, 3, 17, 80, 80),
    (1, 1, 1, 2, 2),
    (3, 2, 5, 96, 32),
    (2, 4, 33, 10, 6),
    (1, 2, 7, 5, 4),
]


def make(shape, rotated, max_len=50, seed=0):
    cos, sin = ops.rotary_tables(max_len, rotated, dtype=torch.float64)
    return {"input": torch.randn(shape, dtype=torch.float64).requires_grad_(), "cos": cos, "sin": sin}


def runner(interleaved=False, offsets=0):
    return lambda backend, **t: ops.rotary(**t, interleaved=interleaved, offsets=offsets, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, interleaved, dtype, backend):
    *shape, rotated = shape
    for offsets in (3, torch.randint(0, 9, (shape[0],))):
        harness.check(runner(interleaved, offsets), make(shape, rotated), dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_instruction_set(isa, interleaved, dtype):
    for *shape, rotated in [(2, 2, 19, 64, 64), (1, 3, 4, 30, 26), (1, 1, 2, 6, 2)]:
        harness.check(runner(interleaved, 5), make(shape, rotated), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(9, 16), (4, 9, 16), (2, 3, 4, 9, 16)])
def test_any_number_of_leading_dimensions(shape, interleaved, backend):
    offsets = [0] if len(shape) == 2 else [0, torch.randint(0, 9, shape[:1])]
    for each in offsets:
        harness.check(runner(interleaved, each), make(shape, 12), torch.float32, backend)


def views(x):
    yield from harness.layouts(x)
    yield "heads inner", x.transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.zeros(x.shape[0], x.shape[2], 3, x.shape[1], x.shape[3], dtype=x.dtype)
    fused[:, :, 1] = x.transpose(1, 2)
    yield "slice of a fused projection", fused[:, :, 1].transpose(1, 2)
    yield "leading dimensions that do not flatten", torch.stack([x, x]).transpose(0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    x = torch.randn(2, 3, 20, 16, dtype=torch.float64)
    for _, view in views(x):
        tensors = {**make((1, 1), 8), "input": view.requires_grad_()}
        harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_keeps_the_memory_order_of_the_input(backend):
    cos, sin = ops.rotary_tables(20, 8)
    x = torch.randn(2, 20, 3, 8).transpose(1, 2).requires_grad_()
    y = ops.rotary(x, cos, sin, backend=backend)
    assert y.is_contiguous()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_dot_product_depends_on_the_distance_alone(interleaved, backend):
    cos, sin = ops.rotary_tables(100, 32)
    q, k = torch.randn(2, 1, 32).unbind(0)
    scores = [
        ops.rotary(q, cos, sin, interleaved=interleaved, offsets=i + 9, backend=backend)
        @ ops.rotary(k, cos, sin, interleaved=interleaved, offsets=i, backend=backend).T
        for i in (0, 40, 90)
    ]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores[2], scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_tables_of_a_low_precision_input(dtype, backend):
    x = torch.randn(2, 2, 9, 16).to(dtype)
    cos, sin = ops.rotary_tables(9, 16)
    exact = ops.rotary(x.double(), cos.double(), sin.double(), backend="torch")
    plain = ops.rotary(x, cos, sin, backend="torch")
    harness.assert_within_budget("y", ops.rotary(x, cos, sin, backend=backend), plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 1e-40])
def test_extreme_scales(scale, backend):
    tensors = make((2, 2, 9, 16), 16)
    with torch.no_grad():
        tensors["input"] *= scale
    harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_nothing_to_rotate(shape, backend):
    harness.check(runner(), make(shape, 8), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rotated_dims(backend):
    x = torch.randn(2, 2, 3, 8)
    assert torch.equal(ops.rotary(x, torch.ones(3, 0), torch.zeros(3, 0), backend=backend), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [2, torch.tensor([0, 5])])
def test_gradcheck_of_the_formula(interleaved, offsets):
    t = make((2, 2, 3, 8), 6)
    check = {"inputs": (t["input"],)}
    run = lambda x: ops.rotary(  # noqa: E731
        x, t["cos"], t["sin"], interleaved=interleaved, offsets=offsets, backend="reference"
    )
    assert torch.autograd.gradcheck(run, **check)
    assert torch.autograd.gradgradcheck(run, **check)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    x = torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = ops.rotary_tables(20, 6)
    for starts in (None, torch.tensor([1, 11])):
        for inverse in (False, True):
            harness.opcheck("rotary", (x, cos, sin, starts, 2, False, inverse, inverse, backend))


def test_compiles_without_graph_breaks_and_once_for_every_offset():
    x = torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = ops.rotary_tables(200, 8)
    compiled = torch.compile(ops.rotary, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(2, 3, 9, 8)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for offset in (0, 3, 4, 5):
            eager, graph = (f(x, cos, sin, offsets=offset, backend="cpu") for f in (ops.rotary, compiled))
            gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (eager, graph)]
            harness.assert_same_bits([[eager, gradients[0]], [graph, gradients[1]]], "compiled differs")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x, cos, sin, offsets=77, backend="cpu")


@pytest.mark.slow
def test_inductor_keeps_the_memory_order():
    x = torch.randn(2, 9, 3, 8).transpose(1, 2).requires_grad_()
    cos, sin = ops.rotary_tables(20, 8)
    compiled = torch.compile(lambda x: ops.rotary(x * 2, cos, sin, backend="cpu") + 1, fullgraph=True)
    upstream = torch.randn(2, 3, 9, 8)
    for y in (compiled(x), ops.rotary(x * 2, cos, sin, backend="torch") + 1):
        (dx,) = torch.autograd.grad(y, x, upstream)
        torch.testing.assert_close(y, ops.rotary(x * 2, cos, sin, backend="cpu") + 1)
        torch.testing.assert_close(dx, 2 * ops.rotary(upstream, cos, -sin, backend="torch"))


def test_bits_do_not_depend_on_threads_or_batch_neighbours(restore_threads):
    t = harness.cast(make((7, 12, 40, 64), 64), torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([ops.rotary(**t, backend="cpu")])
    harness.assert_same_bits(results, "the thread count changes the result")
    alone = ops.rotary(t["input"][4:5], t["cos"], t["sin"], backend="cpu")
    harness.assert_same_bits([[results[0][0][4:5]], [alone]], "neighbours matter")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 16, 6])
def test_bits_do_not_depend_on_alignment(rotated, interleaved, dtype, backend):
    """Of the input, the tables, or the distance between rows: 16 bytes at once, or one element."""
    cos, sin = (t.to(dtype) for t in ops.rotary_tables(9, rotated))
    x, results = torch.randn(2, 3, 9, 32).to(dtype), []
    for start, width in [(0, 32), (1, 32), (0, 33), (0, 40)]:
        view = torch.empty(start + 2 * 3 * 9 * width, dtype=dtype)[start:].view(2, 3, 9, width)[..., :32]
        results.append([ops.rotary(view.copy_(x), cos, sin, interleaved=interleaved, backend=backend)])
    room = torch.empty(1 + cos.numel(), dtype=dtype)[1:].view(cos.shape)
    results.append([ops.rotary(x, room.copy_(cos), sin, interleaved=interleaved, backend=backend)])
    harness.assert_same_bits(results, "alignment changes the result")


def test_float64_goes_to_the_reference_openly():
    t = make((2, 2, 3, 8), 8)
    ops.rotary(**t)
    assert any(name == "rotary" and "float64" in why for name, why in fastgpt.fallbacks())
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"rotary.*float64"):
        ops.rotary(**t)


# --- tables ---


def test_tables_are_rounded_from_float64():
    cos, sin = ops.rotary_tables(3000, 64, 1e5)
    angle = torch.arange(3000, dtype=torch.float64)[:, None] / 1e5 ** (torch.arange(0, 64, 2).double() / 64)
    assert torch.equal(cos, angle.cos().float())
    assert torch.equal(sin, angle.sin().float())


def test_tables_agree_with_transformers():
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for kind in ("default", "llama3"):
        config = transformers.LlamaConfig(hidden_size=2048, num_attention_heads=32, max_position_embeddings=131072)
        config.rope_parameters = {"rope_type": kind, "rope_theta": 500000.0, **(scaling if kind == "llama3" else {})}
        if kind == "default":
            frequency = 500000.0 ** (-torch.arange(0, 64, 2).float() / 64)
        else:
            frequency, _ = rope.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        cos, _ = ops.rotary_tables(2, 64, 500000.0, scaling=scaling if kind == "llama3" else None, dtype=torch.float64)
        torch.testing.assert_close(cos[1].acos(), frequency.double(), rtol=2e-6, atol=1e-9)


# --- errors ---

X, TABLE = torch.ones(2, 3, 5, 8), torch.ones(9, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"input has dtype torch.int64; allowed are"),
        ({"input": torch.ones(8)}, ValueError, r"input has shape \(8,\); it must be \(\.\.\., T, D\)"),
        ({"cos": torch.ones(9, 5)}, ValueError, r"cos has shape \(9, 5\); .* R at most 8"),
        ({"sin": torch.ones(9, 3)}, ValueError, r"sin has shape \(9, 3\); it must be \(9, 4\)"),
        ({"sin": TABLE.double()}, TypeError, r"sin has dtype torch.float64"),
        ({"cos": TABLE.clone().requires_grad_()}, ValueError, r"cos requires grad.*cos.detach\(\)"),
        ({"offsets": 5}, IndexError, r"offsets=5 asks for positions 5 to 9; cos has positions 0 to 8"),
        ({"offsets": -1}, IndexError, r"offsets=-1 asks for positions -1 to 3; cos has positions 0 to 8"),
        ({"offsets": 1.5}, TypeError, r"offsets must be an int or an int64 tensor, not float"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, TypeError, r"offsets has dtype torch.int32"),
        ({"offsets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"offsets has shape \(3,\); it must be \(2,\)"),
        ({"input": X[0, 0], "offsets": torch.zeros(1, dtype=torch.int64)}, ValueError, r"needs a batch dimension"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=rf"rotary: .*{message}"):
        ops.rotary(**{"input": X, "cos": TABLE, "sin": TABLE, **change})


@pytest.mark.parametrize("backend", harness.asynchronous_backends("rotary"))
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_the_tables_are_nan_where_no_error_can_be_raised(interleaved, backend):
    cos, sin = ops.rotary_tables(9, 8)
    x = torch.randn(4, 3, 5, 11)  # of which three dims are copied, where there is a position
    offsets = torch.tensor([4, 7, 2**63 - 1, -1])
    y = ops.rotary(x, cos, sin, offsets=offsets, interleaved=interleaved, backend=backend)
    expected = ops.rotary(x[:1], cos, sin, offsets=4, interleaved=interleaved, backend=backend)
    assert torch.equal(y[:1], expected)
    assert y[1, :, :2].isfinite().all()  # positions 7 and 8
    assert y[1, :, 2:].isnan().all()
    assert y[2:].isnan().all()


@pytest.mark.parametrize("backend", harness.SYNCHRONOUS)
def test_positions_outside_the_tables(backend):
    with pytest.raises(IndexError, match=r"offsets\[1\]=7 asks for positions 7 to 11; cos has positions 0 to 8"):
        ops.rotary(X, TABLE, TABLE, offsets=torch.tensor([4, 7]), backend=backend)
    with pytest.raises(IndexError, match=r"offsets\[0\]=-1 asks for positions -1 to 3; cos has positions 0 to 8"):
        ops.rotary(X, TABLE, TABLE, offsets=torch.tensor([-1, 0]), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 7), r"max_len=4, dim=7"),
        ((4, 8, -1.0), r"theta=-1.0; it must be positive"),
        ((4, 8, float("nan")), r"theta=nan"),
    ],
)
def test_bad_tables(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_tables(*arguments)


def test_bad_scaling():
    with pytest.raises(ValueError, match=r"scaling has the keys \['factor'\]; it must have exactly"):
        ops.rotary_tables(4, 8, scaling={"factor": 2.0})
    good = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"0 < low_freq_factor < high_freq_factor"):
        ops.rotary_tables(4, 8, scaling={**good, "low_freq_factor": 4.0})


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    half=st.integers(0, 3),
    max_len=st.integers(0, 6),
    offset=st.integers(-1, 4),
    interleaved=st.booleans(),
)
def test_any_shape_is_rotated_alike_or_refused(shape, half, max_len, offset, interleaved):
    x, cos = torch.randn(shape), torch.randn(max_len, half)
    sin = torch.randn(max_len, half)
    options = {"interleaved": interleaved, "offsets": offset}
    fits = len(shape) >= 2 and 2 * half <= shape[-1] and offset >= 0 and offset + shape[-2] <= max_len
    if fits:
        expected = ops.rotary(x, cos, sin, **options, backend="torch")
        torch.testing.assert_close(ops.rotary(x, cos, sin, **options, backend="cpu"), expected)
    else:
        with pytest.raises((ValueError, IndexError), match=r"rotary: (input|cos|offsets)"):
            ops.rotary(x, cos, sin, **options)
