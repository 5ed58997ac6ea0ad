import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import harness
from tests.ops.harness import ops
from tests.ops.test_attention_options import seed, slopes

pytestmark = pytest.mark.few_interpreted

BACKENDS = harness.backends("attention_varlen")
# (queries, keys) of each sequence, and rows of no sequence at the end.
LENGTHS = {
    "mixed": ([(5, 5), (0, 7), (1, 12), (40, 40), (3, 0), (17, 64), (0, 0), (50, 20), (1, 33), (30, 30), (45, 60)], 3),
    "equal": ([(60, 60)] * 4, 0),
    "long": ([(130, 130), (80, 80), (40, 150), (100, 110)], 0),
}
# (Hq, H, E, Ev)
HEADS = [(4, 2, 16, 16), (4, 4, 64, 64), (3, 1, 80, 80), (2, 1, 128, 128), (1, 1, 256, 256), (2, 2, 64, 24)]
OPTIONS = {
    "all keys": lambda b, hq: {},
    "causal": lambda b, hq: {"is_causal": True},
    "causal top left": lambda b, hq: {"is_causal": True, "causal_alignment": "top_left"},
    "window": lambda b, hq: {"window": (9, 4)},
    "causal window": lambda b, hq: {"is_causal": True, "window": (12, -1)},
    "softcap": lambda b, hq: {"softcap": 1.5},
    "alibi": lambda b, hq: {"alibi_slopes": slopes(b, hq), "is_causal": True},
    "dropout": lambda b, hq: {"dropout_p": 0.2, "dropout_seed": seed()},
    "sinks": lambda b, hq: {"is_causal": True},
    "all": lambda b, hq: {
        "softcap": 2.0,
        "alibi_slopes": slopes(hq),
        "dropout_p": 0.1,
        "dropout_seed": seed(-3),
        "window": (40, 3),
    },
}


def cumulative(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make(lengths, heads, sinks=False, sinks_grad=False):
    """Tensors of packed sequences, and the arguments that say where they lie."""
    sequences, tail = lengths
    hq, h, e, ev = heads
    queries, keys = (list(x) for x in zip(*sequences, strict=True)) if sequences else ([], [])
    sizes = {"query": (sum(queries) + tail, hq, e), "key": (sum(keys) + tail, h, e), "value": (sum(keys) + tail, h, ev)}
    tensors = {name: torch.randn(size, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    if sinks:
        tensors["sinks"] = torch.randn(hq, dtype=torch.float64).requires_grad_(sinks_grad)
    where = {
        "cu_seqlens_q": cumulative(queries),
        "cu_seqlens_k": cumulative(keys),
        "max_seqlen_q": max(queries, default=0),
        "max_seqlen_k": max(keys, default=0),
    }
    return tensors, where


def case(option, lengths, heads, sinks_grad=False):
    tensors, where = make(lengths, heads, option in ("sinks", "all"), sinks_grad)
    options = OPTIONS[option](len(lengths[0]), heads[0])

    def run(backend, **tensors):
        return ops.attention_varlen(**tensors, **where, **options, backend=backend)

    return run, tensors


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients(option, backend, dtype):
    cases = [("mixed", HEADS[0]), ("equal", HEADS[1]), ("long", HEADS[0])]
    for lengths, heads in cases[:1] if harness.takes_seconds(backend) and option != "causal window" else cases:
        run, tensors = case(option, LENGTHS[lengths], heads)
        harness.check(run, tensors, dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("heads", HEADS[2:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend, heads, dtype):
    for option in ("causal", "all"):
        run, tensors = case(option, LENGTHS["mixed"], heads)
        harness.check(run, tensors, dtype, backend)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_sinks(backend, dtype):
    """Many heads, lest two maxima of a few noisy errors be compared."""
    run, tensors = case("all", LENGTHS["mixed"], (24, 4, 16, 16), sinks_grad=True)
    harness.check(run, tensors, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_equal_lengths_are_a_dense_batch(option, backend):
    """Dropout included: the sequence is the batch row that the random numbers are counted by."""
    batch, length, (hq, h, e, ev) = 3, 20, (4, 2, 16, 16)
    run, tensors = case(option, ([(length, length)] * batch, 0), (hq, h, e, ev), sinks_grad=True)
    tensors = harness.cast(tensors, torch.float32)
    options = {"causal_alignment": "bottom_right", **OPTIONS[option](batch, hq)}

    def dense(backend, query, key, value, sinks=None):
        q, k, v = (x.view(batch, length, -1, e).transpose(1, 2) for x in (query, key, value))
        out = ops.attention(q, k, v, **options, sinks=sinks, enable_gqa=True, backend=backend)
        return out.transpose(1, 2).reshape(batch * length, hq, ev)

    upstream = [torch.randn(batch * length, hq, ev)]
    packed = harness.run_with_gradients(run, backend, tensors, upstream)
    torch.testing.assert_close(packed, harness.run_with_gradients(dense, backend, tensors, upstream))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_sequence_are_zero_and_never_read(backend):
    tensors, where = make(LENGTHS["mixed"], (4, 2, 16, 16))
    t = {n: x.detach().float() for n, x in tensors.items()}
    for x in t.values():
        x[-3:] = math.nan
        x.requires_grad_()
    out = ops.attention_varlen(**t, **where, is_causal=True, backend=backend)
    assert not out[-3:].any()
    gradients = torch.autograd.grad(out.sum(), tuple(t.values()))
    assert all(not g[-3:].any() and g.isfinite().all() for g in gradients)
    assert all(g[:-3].any() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_see_no_key_are_zero(backend):
    tensors, where = make(([(8, 3), (4, 0), (2, 9)], 0), (2, 2, 16, 16))
    t = {n: x.detach().float().requires_grad_() for n, x in tensors.items()}
    out = ops.attention_varlen(**t, **where, is_causal=True, backend=backend)
    zero = torch.tensor([True] * 5 + [False] * 3 + [True] * 4 + [False] * 2)
    assert torch.equal((out == 0).all(-1).all(-1), zero)
    (dq,) = torch.autograd.grad(out.sum(), t["query"])
    assert not dq[zero].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_sequences_of_one_token_give_its_value(dtype, backend):
    tensors, where = make(([(1, 1)] * 20, 0), (2, 1, 64, 64))
    t = harness.cast(tensors, dtype)
    out = ops.attention_varlen(**t, **where, is_causal=True, backend=backend)
    assert torch.equal(out, t["value"].expand_as(out))
    (dv,) = torch.autograd.grad(out.sum(), t["value"])
    assert (dv == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "lengths", [([], 0), ([], 4), ([(0, 0)], 0), ([(0, 0), (0, 0)], 5), ([(3, 0), (2, 0)], 0), ([(0, 3), (0, 2)], 0)]
)
def test_empty_sequences(lengths, backend):
    tensors, where = make(lengths, (2, 1, 8, 8))
    t = {n: x.detach().float().requires_grad_() for n, x in tensors.items()}
    out = ops.attention_varlen(**t, **where, is_causal=True, backend=backend)
    assert out.shape == (tensors["query"].shape[0], 2, 8)
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tuple(t.values())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_neighbours(backend):
    tensors, where = make(LENGTHS["mixed"], (4, 2, 32, 32))
    t = {n: x.detach().float() for n, x in tensors.items()}
    whole = ops.attention_varlen(**t, **where, is_causal=True, backend=backend)
    (q0, q1), (k0, k1) = (where[f"cu_seqlens_{n}"].tolist()[5:7] for n in "qk")  # 17 queries, 64 keys
    alone = ops.attention_varlen(
        t["query"][q0:q1],
        t["key"][k0:k1],
        t["value"][k0:k1],
        cumulative([q1 - q0]),
        cumulative([k1 - k0]),
        where["max_seqlen_q"],
        where["max_seqlen_k"],
        is_causal=True,
        backend=backend,
    )
    harness.assert_same_bits([[whole[q0:q1].contiguous()], [alone]], "neighbours matter")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_projection_views_are_read_in_place(dtype, backend):
    """The packed projection (T, 3, H, D): gradients flow back into it."""
    where = (cumulative([20, 1, 30]), cumulative([20, 1, 30]), 30, 30)

    def run(backend, qkv):
        return ops.attention_varlen(*qkv.unbind(1), *where, is_causal=True, backend=backend)

    qkv = torch.randn(51, 3, 4, 24, dtype=torch.float64).requires_grad_()
    harness.check(run, {"qkv": qkv}, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    tensors, where = make(([(20, 20), (31, 31)], 0), (3, 3, 20, 20))
    t = harness.cast(tensors, torch.float32)
    upstream = [torch.randn(51, 3, 20)]

    def run(backend, **t):
        return ops.attention_varlen(**t, **where, is_causal=True, backend=backend)

    expected = harness.run_with_gradients(run, backend, t, upstream)
    for name in t:
        for _, view in harness.layouts(t[name].detach()):
            viewed = {**t, name: view.requires_grad_()}
            torch.testing.assert_close(harness.run_with_gradients(run, backend, viewed, upstream), expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck_of_the_formula(option):
    run, tensors = case(option, ([(2, 3), (0, 2), (1, 2), (1, 0)], 1), (2, 1, 2, 1), sinks_grad=True)
    names, values = list(tensors), tuple(tensors.values())

    def formula(*values):
        return run("reference", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(formula, values)
    if option == "all":
        assert torch.autograd.gradgradcheck(formula, values)


@pytest.mark.parametrize("backend", harness.backends_without_interpreters("attention_varlen"))
@settings(max_examples=30)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 90)), min_size=1, max_size=5),
    dim=st.integers(1, 70),
    left=st.integers(-1, 90),
    right=st.integers(-1, 90),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    everything=st.booleans(),
)
def test_any_lengths_and_window(backend, lengths, dim, left, right, alignment, everything):
    """One set of sizes is too small a sample for the budget: here a wrong edge must show, not the last digit."""
    tensors, where = make((lengths, 0), (2, 1, dim, dim), everything, True)
    options = {"window": (left, right), "causal_alignment": alignment}
    if everything:
        options |= {"softcap": 3.0, "alibi_slopes": slopes(2), "dropout_p": 0.3, "dropout_seed": seed(dim)}
    t = harness.cast(tensors, torch.float32)
    exact_inputs = harness.cast(t, torch.float64)
    upstream = [torch.randn(tensors["query"].shape)]

    def run(backend, **t):
        return ops.attention_varlen(**t, **where, **options, backend=backend)

    exact = harness.run_with_gradients(run, "torch", exact_inputs, upstream)
    actual = harness.run_with_gradients(run, backend, t, upstream)
    for a, e in zip([*actual[0], *actual[1].values()], [*exact[0], *exact[1].values()], strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
@pytest.mark.parametrize(
    "sizes",
    [
        ([(1, 0), (70, 90), (0, 5), (30, 31)], 33, 20, 3, "top_left", False),
        ([(65, 64), (64, 90)], 16, -1, 30, "bottom_right", True),
    ],
)
def test_some_lengths_and_windows(sizes, backend):
    test_any_lengths_and_window.hypothesis.inner_test(backend, *sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    q, k, v = (torch.randn(s, requires_grad=True) for s in ((9, 4, 8), (11, 2, 8), (11, 2, 5)))
    where = (cumulative([4, 0, 5]), cumulative([7, 1, 3]))
    extras, numbers = (torch.randn(4, requires_grad=True), slopes(3, 4), seed()), (5, 7, 0.3, 2.0, 9000, 3, 0, True)
    harness.opcheck("attention_varlen", (q, k, v, *where, *extras, *numbers, backend))
    with torch.no_grad():
        out, lse = harness.raw("attention_varlen", q, k, v, *where, *extras, *numbers, backend)
    t = [x.detach() for x in (torch.randn_like(out), q, k, v)]
    extras = tuple(x.detach() for x in extras)
    harness.opcheck("attention_varlen_backward", (*t, *where, *extras, out, lse, *numbers, backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_breaks(backend):
    run, tensors = case("all", LENGTHS["mixed"], (4, 2, 16, 16), sinks_grad=True)
    t = harness.cast(tensors, torch.float32)
    compiled = torch.compile(lambda **t: run(backend, **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(tensors["query"].shape)]
    eager = harness.run_with_gradients(run, backend, t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), backend, t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


Q, K, CU = torch.ones(6, 4, 8), torch.ones(9, 2, 8), cumulative([2, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, r"query has shape \(4, 8\); it must be \(total, heads, head dim\)"),
        ({"query": Q.int()}, TypeError, r"query has dtype torch.int32"),
        ({"key": K.half()}, TypeError, r"key has dtype torch.float16"),
        ({"key": K[..., :7]}, ValueError, r"key has shape \(9, 2, 7\); its last dimension must be 8"),
        ({"value": K[:8]}, ValueError, r"value has shape \(8, 2, 8\); it must be \(9, 2, head dim\), as key is"),
        ({"query": Q[:, :3]}, ValueError, r"key has 2 heads, which must divide query's 3"),
        ({"cu_seqlens_q": [0, 6]}, TypeError, r"cu_seqlens_q must be a Tensor, not list"),
        ({"cu_seqlens_q": CU.long()}, TypeError, r"cu_seqlens_q has dtype torch.int64; it must be torch.int32"),
        ({"cu_seqlens_q": CU[None]}, ValueError, r"cu_seqlens_q has shape \(1, 3\); it must have 1 dimension"),
        ({"cu_seqlens_q": CU[:0]}, ValueError, r"cu_seqlens_q is empty"),
        ({"cu_seqlens_k": CU.to("meta")}, ValueError, r"cu_seqlens_k is on meta"),
        ({"cu_seqlens_k": CU[:2]}, ValueError, r"cu_seqlens_k has 2 elements; it must have 3, as cu_seqlens_q has"),
        ({"max_seqlen_q": 4.0}, TypeError, r"max_seqlen_q must be an int, not float"),
        ({"max_seqlen_k": -1}, ValueError, r"max_seqlen_k=-1 must not be negative"),
        (
            {"alibi_slopes": torch.ones(3, 4)},
            ValueError,
            r"alibi_slopes has shape \(3, 4\); it must be \(4,\) or \(2, 4\)",
        ),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks has shape \(2,\)"),
        ({"dropout_p": 2.0}, ValueError, r"dropout_p=2.0"),
        ({"causal_alignment": "left"}, ValueError, r"causal_alignment='left'"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"query": Q, "key": K, "value": K, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(error, match="attention_varlen: " + message):
        ops.attention_varlen(**{**arguments, "max_seqlen_q": 4, "max_seqlen_k": 4, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": CU + 1}, r"cu_seqlens_q\[0\] is 1; it must be 0"),
        ({"cu_seqlens_k": cumulative([3, -1])}, r"cu_seqlens_k\[2\]=2 is below the 3 before it"),
        ({"cu_seqlens_k": cumulative([7, 3])}, r"cu_seqlens_k\[2\]=10 is above the number of rows, 9"),
        ({"max_seqlen_q": 3}, r"cu_seqlens_q\[1\] .. \[2\] is a sequence of 4, above max_seqlen_q=3"),
    ],
)
def test_values_that_would_read_elsewhere_are_refused(backend, change, message):
    arguments = {"query": Q, "key": K, "value": K, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises(ValueError, match="attention_varlen: " + message):
        ops.attention_varlen(**{**arguments, "max_seqlen_q": 4, "max_seqlen_k": 7, **change}, backend=backend)
