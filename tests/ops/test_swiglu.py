import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

BACKENDS = harness.backends("swiglu")
SHAPES = [(5, 123, 124), (4, 768), (1, 2), (300, 2), (1, 40000), (200, 18), (8,), (130, 64)]


def make(shape, packed, scale=2.0):
    names = ["gate"] if packed else ["gate", "up"]
    return {name: (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_() for name in names}


def run(backend, **t):
    return ops.swiglu(t["gate"], t.get("up"), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, packed, dtype, backend):
    harness.check(run, make(shape, packed), dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5), (1,), ()])
def test_odd_sizes_unpacked(shape, backend):
    harness.check(run, make(shape, False), torch.float32, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype):
    for shape in [(5, 122), (66, 64), (2, 6)]:
        for packed in (False, True):
            harness.check(run, make(shape, packed), dtype, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts(packed, backend):
    for _, view in harness.layouts(torch.randn(6, 40, dtype=torch.float64)):
        tensors = {**make((6, 40), packed), "gate": view.requires_grad_()}
        harness.check(run, tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_fused_projection(backend):
    fused = torch.randn(3, 7, 50, dtype=torch.float64)
    slices = {"gate": fused[..., 3:20], "up": fused[..., 30:47]}
    apart = {"gate": fused[..., 3:20], "up": torch.randn(3, 7, 30, dtype=torch.float64)[..., 4:21]}
    packed = {"gate": fused[..., 5:45]}
    rows = {"gate": fused[:, 2:5], "up": fused[:, 1:4]}  # rows are not evenly spaced: copied
    expanded = {"gate": fused[:, :1].expand(3, 7, 50), "up": fused}
    for tensors in (slices, apart, packed, rows, expanded):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        harness.check(run, leaves, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("width", [31, 40, 264, 4099])
def test_slices_aligned_and_not(width, dtype, backend):
    """Rows whose starts are all multiples of 16 bytes, and such as are not; widths that end within 16 bytes."""
    fused = torch.randn(9, 3 * 4104, dtype=torch.float64)
    for first in (0, 8, 3):
        parts = {"gate": fused[:, first : first + width], "up": fused[:, 4104 : 4104 + width]}
        harness.check(run, {name: t.detach().requires_grad_() for name, t in parts.items()}, dtype, backend)


# The Triton kernels have as many programs as there are tiles.
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_more_rows_than_a_grid_has_at_once(backend):
    harness.check(run, make((16400, 33), False), torch.float32, backend)


@pytest.mark.parametrize("packed", [False, True])
def test_bits_do_not_depend_on_the_schedule(packed):
    t = harness.cast(make((33, 80), packed), torch.float32)
    upstream = [torch.randn(33, 40 if packed else 80)]

    def results():
        outputs, gradients = harness.run_with_gradients(run, "simt", t, upstream)
        return [*outputs, *gradients.values()]

    harness.assert_same_bits(harness.under_every_schedule(results), "the order of lanes and blocks changes the result")


@pytest.mark.parametrize("packed", [False, True])
def test_slices_are_read_in_place(packed):
    """The forward allocates its result and nothing else."""
    fused = torch.randn(64, 3000)
    arguments = (fused[:, 100:2100],) if packed else (fused[:, :1000], fused[:, 2000:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.swiglu(*arguments, backend="cpu")
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::contiguous", "aten::copy_", "aten::clone"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0, 8), (3, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_no_elements(shape, packed, backend):
    harness.check(run, make(shape, packed), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 1e-40])
def test_extreme_scales(scale, backend):
    harness.check(run, make((9, 100), False, scale), torch.float32, backend)


def check_limits(backend):
    inf = math.inf
    for dtype in harness.FLOATS:
        gate = torch.tensor([-inf, inf, math.nan, 0.0, -6e4, 6e4], dtype=dtype).requires_grad_()
        up = torch.ones(6, dtype=dtype).requires_grad_()
        y = ops.swiglu(gate, up, backend=backend)
        silu = torch.tensor([0.0, inf, math.nan, 0.0, 0.0, 6e4], dtype=dtype)
        assert torch.equal(y.nan_to_num(7.0), silu.nan_to_num(7.0)), dtype
        dgate, dup = torch.autograd.grad(y, (gate, up), torch.ones_like(y))
        slope = torch.tensor([0.0, 1.0, math.nan, 0.5, 0.0, 1.0], dtype=dtype)
        assert torch.equal(dgate.nan_to_num(7.0), slope.nan_to_num(7.0)), dtype
        assert torch.equal(dup.nan_to_num(7.0), silu.nan_to_num(7.0)), dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_limits(backend):
    check_limits(backend)


def test_limits_on_every_instruction_set(isa):
    check_limits("cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_of_the_formula(packed):
    t = make((3, 4, 6), packed)
    names = list(t)
    assert torch.autograd.gradcheck(
        lambda *values: run("reference", **dict(zip(names, values, strict=True))), tuple(t.values())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    harness.opcheck("swiglu", (gate, up, backend))
    harness.opcheck("swiglu", (gate, None, backend))
    gate, up = gate.detach(), up.detach()
    harness.opcheck("swiglu_backward", (up, gate, up, backend))
    harness.opcheck("swiglu_backward", (up[:, :4], gate, None, backend))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_graph_breaks(packed):
    t = harness.cast(make((4, 16), packed), torch.float32)
    compiled = torch.compile(lambda **t: run("cpu", **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(4, 8 if packed else 16)]
    eager = harness.run_with_gradients(run, "cpu", t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


@pytest.mark.parametrize("packed", [False, True])
def test_bits_do_not_depend_on_threads(packed, restore_threads):
    t = harness.cast(make((333, 222), packed), torch.float32)
    upstream = [torch.randn(333, 111 if packed else 222)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(run, "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


def test_float64_goes_to_the_reference_openly():
    x = torch.randn(2, 8, dtype=torch.float64)
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"swiglu.*float64.*strict"):
        ops.swiglu(x)
    with pytest.raises(NotImplementedError, match=r"backend='cpu' does not take dtype torch.float64"):
        ops.swiglu(x, backend="cpu")
    assert torch.equal(ops.swiglu(x), ops.swiglu(x, backend="reference"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(2, 8).long()}, TypeError, r"swiglu: gate has dtype torch.int64; allowed are float32"),
        ({"gate": None}, TypeError, r"gate must be a Tensor, not NoneType"),
        ({"gate": torch.ones(2, 7)}, ValueError, r"gate has shape \(2, 7\).*\[gate, up\], an even number"),
        ({"gate": torch.tensor(1.0)}, ValueError, r"gate has shape \(\).*an even number"),
        ({"up": torch.ones(2, 7)}, ValueError, r"up has shape \(2, 7\); it must be \(2, 8\) \(gate's shape\)"),
        ({"up": torch.ones(2, 8).half()}, TypeError, r"up has dtype torch.float16; it must be torch.float32"),
        ({"up": torch.ones(2, 8, device="meta")}, ValueError, r"up is on meta, but gate is on cpu"),
        (
            {"backend": "gpu"},
            ValueError,
            r"backend='gpu' is unknown; allowed are 'fused', 'reference', 'cpu'",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.swiglu(**{"gate": torch.ones(2, 8), **change})


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    narrow=st.integers(0, 3),
    swap=st.booleans(),
    packed=st.booleans(),
)
def test_any_view(shape, narrow, swap, packed):
    """Slices and transpositions of any shape: read in place or copied, the values are the same."""
    tensors = {}
    for name in ["gate"] if packed else ["gate", "up"]:
        base = torch.randn([*shape[:-1], 2 * shape[-1] + narrow])
        view = base[..., narrow:]
        if swap and view.dim() > 2:
            view = view.transpose(0, 1)
        tensors[name] = view.requires_grad_()
    # Not by the budget, which needs more than a handful of elements.
    upstream = [torch.randn_like(run("torch", **tensors))]
    outputs, gradients = harness.run_with_gradients(run, "cpu", tensors, upstream)
    expected, expected_gradients = harness.run_with_gradients(run, "torch", tensors, upstream)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)
