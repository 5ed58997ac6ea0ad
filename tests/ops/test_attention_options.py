"""attention's softcap, ALiBi, sinks and dropout, on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.ops import philox
from tests.ops import harness
from tests.ops.harness import ops

pytestmark = pytest.mark.few_interpreted

BACKENDS = harness.backends("attention")
MANY_CALLS = harness.backends_without_interpreters("attention")
TRITON = [backend for backend in BACKENDS if backend == "triton"]
HERE = harness.backends_here("attention")
# (B, Hq, H, L, S, E, Ev)
SHAPES = [
    (5, 4, 2, 65, 97, 16, 16),
    (1, 4, 1, 65, 130, 64, 64),
    (2, 2, 2, 70, 70, 80, 80),
    (2, 2, 2, 40, 33, 128, 128),
    (2, 2, 1, 17, 50, 256, 256),
    (2, 3, 3, 50, 90, 32, 48),
    (2, 3, 3, 90, 51, 64, 24),
    (30, 4, 4, 1, 61, 64, 64),
]
# The gradient of the sinks has an element per head: many heads, lest two maxima of a few noisy errors be compared.
MANY_HEADS = [(2, 24, 4, 33, 47, 32, 32), (1, 64, 16, 64, 64, 32, 32)]


def slopes(*sizes):
    """Press et al.'s: 2^(-8 / Hq), its square, ... and smaller from one batch row to the next."""
    heads = sizes[-1]
    geometric = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
    return geometric if len(sizes) == 1 else geometric / torch.arange(1, sizes[0] + 1)[:, None]


def seed(value=12345):
    return torch.tensor([value])


# Each by name, for a shape: what `attention` is given besides query, key, value and sinks.
OPTIONS = {
    "softcap": lambda b, hq, *_: {"softcap": 1.5},
    "alibi": lambda b, hq, *_: {"alibi_slopes": slopes(hq)},
    "alibi per row": lambda b, hq, *_: {
        "alibi_slopes": slopes(b, hq),
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "sinks": lambda b, hq, *_: {},
    "dropout": lambda b, hq, *_: {"dropout_p": 0.3, "dropout_seed": seed()},
    "all": lambda b, hq, *_: {
        "softcap": 2.0,
        "alibi_slopes": slopes(b, hq),
        "dropout_p": 0.1,
        "dropout_seed": seed(-7),
        "window": (30, 5),
        "causal_alignment": "bottom_right",
    },
    "all with a mask": lambda b, hq, length, keys: {
        "softcap": 2.0,
        "alibi_slopes": slopes(hq),
        "dropout_p": 0.2,
        "dropout_seed": seed(2**40 + 3),
        "attn_mask": torch.arange(b * length * keys).view(b, 1, length, keys) % 7 > 1,
    },
}


def make(shape, with_sinks=True, sinks_grad=True):
    b, hq, h, length, keys, e, ev = shape
    sizes = {"query": (b, hq, length, e), "key": (b, h, keys, e), "value": (b, h, keys, ev)}
    tensors = {name: torch.randn(size, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}
    if with_sinks:
        tensors["sinks"] = torch.randn(hq, dtype=torch.float64).requires_grad_(sinks_grad)
    return tensors


def case(name, shape, sinks_grad=True):
    """run(backend, **tensors) with the option, and the tensors."""
    b, hq, _, length, keys = shape[:5]
    chosen = OPTIONS[name](b, hq, length, keys)

    def run(backend, **tensors):
        return ops.attention(**tensors, **chosen, enable_gqa=True, backend=backend)

    return run, make(shape, name == "sinks" or name.startswith("all"), sinks_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients(option, shape, dtype, backend):
    run, tensors = case(option, shape, sinks_grad=False)
    harness.check(run, tensors, dtype, backend, gradients=shape[3] > 1)  # one query: decoding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("shape", MANY_HEADS)
@pytest.mark.parametrize("option", ["sinks", "all", "all with a mask"])
def test_gradient_of_the_sinks(option, shape, dtype, backend):
    run, tensors = case(option, shape)
    harness.check(run, tensors, dtype, backend)


@pytest.mark.parametrize("option", OPTIONS)
def test_gradcheck_of_the_formula(option):
    run, tensors = case(option, (2, 4, 2, 5, 6, 3, 2))
    names, values = list(tensors), tuple(tensors.values())

    def formula(*values):
        return run("reference", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(formula, values)
    if option == "all":
        run, tensors = case(option, (1, 2, 1, 2, 3, 2, 1))
        values = tuple(tensors.values())
        assert torch.autograd.gradgradcheck(formula, values)


@pytest.mark.parametrize("backend", MANY_CALLS)
@settings(max_examples=40)
@given(
    length=st.integers(1, 100),
    keys=st.integers(1, 150),
    dim=st.integers(1, 70),
    left=st.integers(-1, 150),
    right=st.integers(-1, 150),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    softcap=st.sampled_from([0.0, 0.5, 5.0]),
    alibi=st.booleans(),
    sinks=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3, 0.999]),
)
def test_any_size_and_options(backend, length, keys, dim, left, right, alignment, softcap, alibi, sinks, dropout_p):
    """One set of sizes is too small a sample for the budget: here a wrong edge must show, not the last digit."""
    options = {
        "window": (left, right),
        "causal_alignment": alignment,
        "softcap": softcap,
        "alibi_slopes": slopes(2) if alibi else None,
        "dropout_p": dropout_p,
        "dropout_seed": seed(length),
    }
    exact_inputs = make((1, 2, 1, length, keys, dim, dim), sinks)
    t = harness.cast(exact_inputs, torch.float32)
    exact_inputs = harness.cast(t, torch.float64)
    upstream = [torch.randn(1, 2, length, dim)]

    def run(backend, **t):
        return ops.attention(**t, **options, enable_gqa=True, backend=backend)

    exact = harness.run_with_gradients(run, "torch", exact_inputs, upstream)
    actual = harness.run_with_gradients(run, backend, t, upstream)
    for a, e in zip([*actual[0], *actual[1].values()], [*exact[0], *exact[1].values()], strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4 / (1 - dropout_p))


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, -1, -1, "top_left", 0.0, False, False, 0.0),
        (100, 37, 5, 3, 0, "bottom_right", 0.0, False, False, 0.0),
        (33, 150, 33, -1, 9, "top_left", 0.0, True, False, 0.999),
        (97, 300, 64, 40, 150, "bottom_right", 0.0, False, True, 0.0),  # tiles that the window cuts, tiles it does not
        (70, 129, 70, 40, -1, "bottom_right", 5.0, True, True, 0.3),
        (17, 64, 16, 0, 0, "top_left", 0.5, False, True, 0.3),
    ],
)
def test_some_sizes_and_options(sizes, backend):
    test_any_size_and_options.hypothesis.inner_test(backend, *sizes)


def test_alibi_and_softcap_by_hand():
    """One query dim of value 1, so that the scores are the keys; values that pick one weight."""
    scores = torch.tensor([0.5, -3.0, 20.0])
    query, key, value = torch.ones(1, 2, 1), scores.view(1, 3, 1), torch.eye(3)[None]
    capped = 2 * torch.tanh(scores / 2)
    for i, distance in enumerate(([1, 0, 1], [2, 1, 0])):  # 2 queries over 3 keys: query i stands at key i + 1
        expected = torch.softmax(capped - 0.25 * torch.tensor(distance), 0)
        for backend in (*HERE, "torch"):
            out = ops.attention(
                query, key, value, scale=1.0, softcap=2.0, alibi_slopes=torch.tensor([0.25]), backend=backend
            )
            torch.testing.assert_close(out[0, i], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_bounds_extreme_scores(backend):
    tensors = make((2, 2, 2, 40, 50, 16, 16), with_sinks=False)
    with torch.no_grad():
        tensors["query"] *= 1e4
    harness.check(lambda b, **t: ops.attention(**t, softcap=30.0, backend=b), tensors, torch.float32, backend)


# --- sinks ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [30, 300])
def test_the_log_sum_exp_has_the_sink(keys, backend):
    """Of keys in one piece, and in two, as kernels split those of few queries."""
    t = {name: x.detach().float() for name, x in make((2, 4, 2, 20, keys, 16, 16)).items()}
    mask = torch.ones(20, keys, dtype=torch.bool).tril(-3)  # queries 0, 1, 2 see no key
    mask[3:, 280:] = True
    scores = (0.25 * t["query"] @ t["key"].repeat_interleave(2, 1).mT).masked_fill(~mask, -math.inf)
    sinks = t["sinks"].view(4, 1, 1).expand(2, 4, 20, 1)
    tensors = (t["query"], t["key"], t["value"], mask[None, None])
    numbers = (0.25, 0.0, 0, -1, -1, False)
    out, lse = harness.raw("attention", *tensors, t["sinks"], None, None, *numbers, backend)
    torch.testing.assert_close(lse, torch.logsumexp(torch.cat([scores, sinks], -1), -1))
    assert not out[:, :, :3].any()
    _, lse = harness.raw("attention", *tensors, None, None, None, *numbers, backend)
    torch.testing.assert_close(lse[:, :, 3:], torch.logsumexp(scores, -1)[:, :, 3:])
    assert (lse[:, :, :3] == math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_rows_that_see_no_key_are_zero(dtype, backend):
    tensors = {n: t.to(dtype).detach().requires_grad_() for n, t in make((2, 2, 2, 30, 20, 16, 16)).items()}
    options = {"softcap": 3.0, "alibi_slopes": slopes(2), "is_causal": True, "causal_alignment": "bottom_right"}
    out = ops.attention(**tensors, **options, backend=backend)
    assert not out[:, :, :10].any()  # queries 0..9 come before every key
    assert out[:, :, 10:].all()
    out = ops.attention(**tensors, **options, attn_mask=torch.zeros(30, 20, dtype=torch.bool), backend=backend)
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tuple(tensors.values())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 2, 2, 5, 0, 8, 8), (2, 2, 2, 0, 5, 8, 8), (0, 2, 2, 5, 5, 8, 8)])
def test_empty_dimensions(shape, backend):
    t = {n: x.detach().float().requires_grad_() for n, x in make(shape).items()}
    out = ops.attention(
        **t, softcap=3.0, alibi_slopes=slopes(2), dropout_p=0.5, dropout_seed=seed(), is_causal=True, backend=backend
    )
    assert out.shape == shape[:2] + shape[3:4] + shape[6:]
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tuple(t.values())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_of_minus_infinity_is_none_and_a_large_one_takes_all(backend):
    t = {n: x.detach().float() for n, x in make((2, 4, 4, 20, 30, 16, 16), with_sinks=False).items()}
    plain = ops.attention(**t, backend=backend)
    torch.testing.assert_close(ops.attention(**t, sinks=torch.full((4,), -math.inf), backend=backend), plain)
    assert ops.attention(**t, sinks=torch.full((4,), 1e4), backend=backend).abs().max() == 0
    half = torch.tensor([-math.inf, 1e4, -math.inf, 1e4])  # a sink is its own head's
    out = ops.attention(**t, sinks=half, backend=backend)
    torch.testing.assert_close(out[:, ::2], plain[:, ::2])
    assert not out[:, 1::2].any()


# --- dropout ---


def kept_weights(p, seed, batch=2, heads=3, queries=40, keys=64, backend="reference", **options):
    """Equal weights with dropout, times the number of keys: value = identity."""
    query, key = torch.zeros(batch, heads, queries, 8), torch.zeros(batch, heads, keys, 8)
    value = torch.eye(keys).expand(batch, heads, keys, keys)
    return ops.attention(query, key, value, dropout_p=p, dropout_seed=seed, backend=backend, **options) * keys


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("keys", [64, 61])
def test_dropout_drops_what_philox_says(keys, backend):
    threshold = round(0.3 * 65536)
    values = philox.dropout_values(seed(-99), 0, 6, 40, keys).view(2, 3, 40, keys)
    expected = (values >= threshold) * (65536 / (65536 - threshold))
    torch.testing.assert_close(kept_weights(0.3, seed(-99), keys=keys, backend=backend), expected.float())


def test_dropout_statistics():
    """Over n weights the share that is kept is 1 - p to 5 standard deviations, in every head, query and key."""
    for p in (0.1, 0.5, 0.9):
        kept = (philox.dropout_values(seed(1), 0, 32, 64, 128) >= round(p * 65536)).double()
        for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
            share = kept.mean(dims)
            deviation = math.sqrt(p * (1 - p) / (kept.numel() / share.numel()))
            assert (share - (1 - p)).abs().max() < 5 * deviation
        # Neighbours are independent: the covariance with the next head, query and key vanishes.
        for dim in range(3):
            size = kept.shape[dim]
            a, b = kept.narrow(dim, 0, size - 1) - (1 - p), kept.narrow(dim, 1, size - 1) - (1 - p)
            assert (a * b).mean().abs() < 5 * p * (1 - p) / math.sqrt(a.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_of_none_and_of_all(backend):
    t = {n: x.detach().float().requires_grad_() for n, x in make((2, 2, 2, 20, 30, 16, 16)).items()}
    plain = ops.attention(**t, backend=backend)
    harness.assert_same_bits([[plain], [ops.attention(**t, dropout_seed=seed(), backend=backend)]], "a seed, p = 0")
    out = ops.attention(**t, dropout_p=1.0, dropout_seed=seed(), backend=backend)
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tuple(t.values())))


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_a_seed_is_drawn_from_torch_where_none_is_given(backend):
    torch.manual_seed(3)
    first, second = kept_weights(0.5, None, backend=backend), kept_weights(0.5, None, backend=backend)
    torch.manual_seed(3)
    again = kept_weights(0.5, None, backend=backend)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    if backend == BACKENDS[0]:
        state = torch.get_rng_state()
        kept_weights(0.5, seed(), backend=backend)
        kept_weights(0.0, None, backend=backend)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["reference"])
def test_dropout_compiles_and_draws_anew_each_time(backend):
    run = torch.compile(lambda: kept_weights(0.5, None, backend=backend), fullgraph=True, backend="aot_eager")
    first, second = run(), run()
    assert not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}


# --- registration, arguments, fallbacks ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    q, k, v = (torch.randn(s, requires_grad=True) for s in ((2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 5)))
    sinks = torch.randn(4, requires_grad=True)
    tensors, numbers = (torch.rand(1, 1, 6, 7) > 0.3, sinks, slopes(2, 4), seed()), (0.3, 2.0, 9000, 3, 0, True)
    harness.opcheck("attention", (q, k, v, *tensors, *numbers, backend))
    with torch.no_grad():
        out, lse = harness.raw("attention", q, k, v, *tensors, *numbers, backend)
    t = [x.detach() for x in (torch.randn_like(out), q, k, v)]
    tensors = (tensors[0], sinks.detach(), *tensors[2:])
    harness.opcheck("attention_backward", (*t, *tensors, out, lse, *numbers, False, backend))


@pytest.mark.parametrize("backend", ["reference"])
def test_compiles_without_graph_breaks(backend):
    run, tensors = case("all", (2, 4, 2, 9, 12, 16, 16))
    t = harness.cast(tensors, torch.float32)
    compiled = torch.compile(lambda **t: run(backend, **t), fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(2, 4, 9, 16)]
    eager = harness.run_with_gradients(run, backend, t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), backend, t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


@pytest.mark.parametrize("lead", [(3,), (1, 3), (2, 5, 3)])
def test_leading_dimensions(lead):
    t = {n: torch.randn(*lead, s, 8) for n, s in (("query", 4), ("key", 6), ("value", 6))}
    options = {"sinks": torch.randn(3), "dropout_p": 0.4, "dropout_seed": seed()}
    for alibi in (slopes(3), torch.rand(*lead)):
        for backend in (*HERE, "torch"):
            out = ops.attention(**t, **options, alibi_slopes=alibi, backend=backend)
            flat = {n: x.reshape(-1, 3, *x.shape[-2:]) for n, x in t.items()}
            whole = alibi.expand(lead).reshape(-1, 3)
            expected = ops.attention(**flat, **options, alibi_slopes=whole, backend=backend)
            torch.testing.assert_close(out, expected.view(out.shape))


Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"softcap": -1.0}, ValueError, r"softcap=-1.0 must be a positive number, or 0 for none"),
        ({"softcap": math.inf}, ValueError, r"softcap=inf must be"),
        ({"softcap": math.nan}, ValueError, r"softcap=nan must be"),
        ({"sinks": [0.0] * 4}, TypeError, r"sinks must be a Tensor, not list"),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks has shape \(2,\); it must be \(4,\) \(one logit per query head"),
        ({"sinks": torch.ones(4).half()}, TypeError, r"sinks has dtype torch.float16; it must be torch.float32"),
        ({"sinks": torch.ones(4, device="meta")}, ValueError, r"sinks is on meta"),
        ({"alibi_slopes": 0.5}, TypeError, r"alibi_slopes must be a Tensor, not float"),
        ({"alibi_slopes": torch.ones(4).double()}, TypeError, r"alibi_slopes has dtype torch.float64; it must be"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes has shape \(3,\); it must be \(4,\) or \(2, 4\)"),
        ({"alibi_slopes": torch.ones(1, 4)}, ValueError, r"alibi_slopes has shape \(1, 4\)"),
        ({"alibi_slopes": torch.ones(4, device="meta")}, ValueError, r"alibi_slopes is on meta"),
        ({"alibi_slopes": torch.ones(4, requires_grad=True)}, NotImplementedError, r"alibi_slopes requires grad"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p=-0.1 must lie between 0 and 1"),
        ({"dropout_p": math.nan}, ValueError, r"dropout_p=nan"),
        ({"dropout_seed": 5}, TypeError, r"dropout_seed must be a Tensor or None, not int"),
        ({"dropout_seed": seed().int()}, TypeError, r"dropout_seed has dtype torch.int32; it must be torch.int64"),
        ({"dropout_seed": torch.zeros(2).long()}, ValueError, r"dropout_seed has shape \(2,\)"),
        ({"dropout_seed": seed().to("meta")}, ValueError, r"dropout_seed is on meta"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match="attention: " + message):
        ops.attention(**{"query": Q, "key": K, "value": K, "enable_gqa": True, **change})
