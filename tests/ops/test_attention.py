import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt
from tests.ops import harness
from tests.ops.harness import ops

pytestmark = pytest.mark.few_interpreted

BACKENDS = harness.backends("attention")
# (B, Hq, H, L, S, E, Ev)
SHAPES = [
    (5, 3, 3, 41, 41, 41, 41),
    (1, 2, 2, 123, 123, 123, 123),
    (2, 4, 2, 200, 97, 80, 80),  # grouped; more queries than keys
    (2, 6, 1, 9, 300, 64, 64),  # multi-query
    (1, 2, 1, 50, 250, 96, 96),
    (40, 2, 2, 5, 3, 8, 8),
    (1, 1, 1, 70, 500, 256, 256),
    (9, 4, 4, 17, 33, 16, 48),  # Ev != E
    (9, 4, 4, 33, 17, 40, 24),
]
BANDS = {
    "all": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (20, 7)},
    "causal window": {"is_causal": True, "window": (30, -1), "causal_alignment": "bottom_right"},
}


def make(shape):
    b, hq, h, length, keys, e, ev = shape
    sizes = {"query": (b, hq, length, e), "key": (b, h, keys, e), "value": (b, h, keys, ev)}
    return {name: torch.randn(size, dtype=torch.float64).requires_grad_() for name, size in sizes.items()}


def runner(**options):
    """Grouped attention. Where Ev != E torch leaves its fused kernel for plain float32 operations, which keep P and the
    unrounded output for the backward. Zeros up to Ev = E compare one fused kernel with another."""

    def run(backend, query, key, value, attn_mask=None):
        width, wanted = query.shape[-1], value.shape[-1]
        pad = backend == "torch" and query.dtype != torch.float64 and width != wanted
        if pad:
            wide = max(width, wanted)
            options_scale = options.get("scale") or 1 / math.sqrt(width)
            query, key, value = (F.pad(t, (0, wide - t.shape[-1])) for t in (query, key, value))
            return ops.attention(
                query, key, value, attn_mask, enable_gqa=True, backend=backend, **{**options, "scale": options_scale}
            )[..., :wanted]
        return ops.attention(query, key, value, attn_mask, enable_gqa=True, backend=backend, **options)

    return run


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("band", BANDS)
def test_values_and_gradients(band, shape, dtype):
    harness.check(runner(**BANDS[band]), make(shape), dtype, "cpu")


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("band", BANDS)
def test_values_and_gradients_of_the_reference(band, dtype):
    for shape in SHAPES[:3]:
        harness.check(runner(**BANDS[band]), make(shape), dtype, "reference")


def masks(b, hq, length, keys):
    """Every kind of mask by name; each leaves some rows without a key where it can."""
    boolean = torch.rand(b, hq, length, keys) > 0.5
    boolean[:, :, 1] = False
    additive = torch.randn(length, keys)
    additive[2] = -math.inf
    return {
        "boolean": boolean,
        "boolean over keys": torch.rand(b, 1, 1, keys) > 0.3,
        "boolean over queries": torch.rand(length, 1) > 0.3,
        "boolean transposed": (torch.rand(keys, length) > 0.5).t(),
        "additive": additive,
        "additive per head": torch.randn(hq, 1, keys),
        "additive transposed": torch.randn(hq, keys, length).transpose(1, 2),
        "one number": torch.tensor(0.5),
        "one dimension": torch.rand(keys) > 0.5,
    }


@pytest.mark.parametrize("kind", masks(1, 1, 3, 1))
def test_masks_of_the_reference(kind):
    tensors = make((2, 4, 2, 30, 41, 16, 16))
    mask = masks(2, 4, 30, 41)[kind]
    mask = mask if mask.dtype == torch.bool else mask.double()
    upstream = [torch.randn(2, 4, 30, 16)]
    run = runner(is_causal=True)
    whole = mask.expand(2, 4, 30, 41)
    exact = harness.run_with_gradients(lambda b, **t: run(b, attn_mask=whole, **t), "torch", tensors, upstream)
    actual = harness.run_with_gradients(lambda b, **t: run(b, attn_mask=mask, **t), "reference", tensors, upstream)
    torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("kind", masks(1, 1, 3, 1))
def test_masks(kind, dtype):
    for shape, options in [((8, 4, 2, 30, 211, 16, 16), {}), ((24, 2, 2, 61, 61, 32, 32), {"is_causal": True})]:
        b, hq, _, length, keys = shape[:5]
        mask = masks(b, hq, length, keys)[kind]
        # The oracle wants a mask of two dimensions or more, and one of query's dtype.
        whole = mask.expand(b, hq, length, keys) if mask.dim() < 2 else mask
        own = whole if mask.dtype == torch.bool else whole.to(dtype)

        def run(backend, query, key, value, mask=mask, whole=own, options=options):
            if backend == "torch" and whole.is_floating_point():
                mask = whole.to(query.dtype)
            elif backend == "torch":
                mask = whole
            elif mask.is_floating_point():
                mask = mask.to(query.dtype)
            return ops.attention(query, key, value, mask, enable_gqa=True, backend=backend, **options)

        harness.check(run, make(shape), dtype, "cpu")


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
@pytest.mark.parametrize("kind", masks(1, 1, 3, 1))
def test_masks_on_triton(kind, backend):
    """Few numbers, for its interpreters: a wrong stride must show, not the last digit."""
    tensors = harness.cast(make((2, 4, 2, 18, 70, 16, 16)), torch.float32)
    mask, upstream = masks(2, 4, 18, 70)[kind], [torch.randn(2, 4, 18, 16)]
    whole = mask.expand(2, 4, 18, 70)
    whole = whole if mask.dtype == torch.bool else whole.double()
    run, wide = runner(), harness.cast(tensors, torch.float64)
    exact = harness.run_with_gradients(lambda b, **t: run(b, attn_mask=whole, **t), "torch", wide, upstream)
    actual = harness.run_with_gradients(lambda b, **t: run(b, attn_mask=mask, **t), backend, tensors, upstream)
    for a, e in zip([*actual[0], *actual[1].values()], [*exact[0], *exact[1].values()], strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_float32_mask_of_bfloat16_scores(dtype, backend):
    query, key, value = (torch.randn(2, 3, 40, 32).to(dtype) for _ in range(3))
    mask = torch.randn(40, 40)
    exact = ops.attention(query.double(), key.double(), value.double(), mask.double(), backend="torch")
    plain = ops.attention(query, key, value, mask, backend="torch")
    harness.assert_within_budget("out", ops.attention(query, key, value, mask, backend=backend), plain, exact)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_every_instruction_set(isa, dtype):
    for shape in [
        (2, 4, 2, 37, 101, 24, 24),
        (1, 1, 1, 250, 250, 72, 72),
        (2, 1, 1, 65, 40, 7, 7),
        (1, 2, 2, 9, 30, 130, 16),
    ]:
        for band in BANDS.values():
            harness.check(runner(**band), make(shape), dtype, "cpu")
    mask = torch.rand(2, 1, 70, 70) > 0.4
    run = runner(is_causal=True)
    harness.check(lambda backend, **t: run(backend, attn_mask=mask, **t), make((2, 2, 2, 70, 70, 64, 64)), dtype, "cpu")


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("group", [1, 3])
def test_one_query_over_many_keys(isa, group, dtype):
    for keys, dim in [(1, 64), (300, 64), (1000, 80), (77, 5), (260, 256)]:
        tensors = make((3, group * 2, 2, 1, keys, dim, dim))
        harness.check(runner(), tensors, dtype, "cpu", gradients=False)
        harness.check(runner(is_causal=True, causal_alignment="bottom_right"), tensors, dtype, "cpu", gradients=False)
        harness.check(runner(window=(9, 0), causal_alignment="bottom_right"), tensors, dtype, "cpu", gradients=False)
    mask = torch.rand(3, 1, 1, 300) > 0.5
    mask[1] = False
    run = runner()
    tensors = make((3, group * 2, 2, 1, 300, 64, 64))
    harness.check(lambda backend, **t: run(backend, attn_mask=mask, **t), tensors, dtype, "cpu", gradients=False)


@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_gradients_of_a_few_queries(dtype):
    for shape in [(30, 4, 4, 1, 40, 64, 64), (30, 2, 1, 2, 9, 33, 33)]:
        harness.check(runner(), make(shape), dtype, "cpu")


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("length", [1, 3, 50])
def test_a_query_with_one_key_returns_its_value(isa, length, dtype):
    """P is exactly 1: the output is the value and the scores get no gradient at all."""
    t = {n: torch.randn(4, 2, s, 64).to(dtype).requires_grad_() for n, s in (("q", length), ("k", 1), ("v", 1))}
    out = ops.attention(t["q"], t["k"], t["v"], backend="cpu")
    assert torch.equal(out, t["v"].expand_as(out))
    dq, dk = torch.autograd.grad(out, (t["q"], t["k"]), torch.randn_like(out))
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_projection_views_are_read_in_place(dtype, backend):
    """The model's (B, T, 3, H, D) projection: gradients flow back into it."""
    qkv = torch.randn(2, 45, 3, 4, 24, dtype=torch.float64).requires_grad_()

    def run(backend, qkv):
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return ops.attention(query, key, value, is_causal=True, backend=backend)

    harness.check(run, {"qkv": qkv}, dtype, backend)


def test_layouts():
    for _, view in harness.layouts(torch.randn(20, 3, 30, 20, dtype=torch.float64)):
        for name in ("query", "key", "value"):
            tensors = {**make((20, 3, 3, 30, 30, 20, 20)), name: view.detach().requires_grad_()}
            harness.check(runner(is_causal=True), tensors, torch.float32, "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_misaligned_pointers(backend):
    buffers = [torch.randn(2 * 3 * 30 * 20 + 1) for _ in range(3)]
    q, k, v = (b[1:].view(2, 3, 30, 20) for b in buffers)
    aligned = ops.attention(q.clone(), k.clone(), v.clone(), is_causal=True, backend=backend)
    harness.assert_same_bits(
        [[aligned], [ops.attention(q, k, v, is_causal=True, backend=backend)]], "alignment matters"
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("length", [30, 70])
def test_what_lies_beside_a_row_is_not_read(length, dtype, backend):
    """Rows off any alignment, with NaN between them."""
    tensors = make((2, 3, 3, length, length, 24, 24))
    for name, t in tensors.items():
        view = torch.full((*t.shape[:-1], 26), math.nan, dtype=t.dtype)[..., 1:25]
        tensors[name] = view.copy_(t.detach()).requires_grad_()
    harness.check(runner(is_causal=True), tensors, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((40, 16), (50, 16), (50, 12)),
        ((3, 40, 16), (3, 50, 16), (3, 50, 16)),
        ((3, 40, 16), (50, 16), (50, 16)),
        ((2, 1, 40, 16), (3, 50, 16), (2, 1, 50, 16)),
        ((2, 3, 40, 16), (1, 3, 50, 16), (2, 1, 50, 16)),
        ((2, 3, 40, 16), (2, 1, 50, 16), (1, 1, 50, 16)),
        ((2, 2, 3, 40, 16), (2, 1, 3, 50, 16), (2, 1, 50, 16)),
        ((3, 40, 16), (3, 50, 16), (7, 3, 50, 16)),
        ((2, 3, 2, 2, 40, 16), (2, 1, 2, 1, 50, 16), (1, 3, 1, 2, 50, 16)),
    ],
)
def test_leading_dimensions_broadcast_as_in_torch(query, key, value, backend):
    sizes = {"query": query, "key": key, "value": value}
    tensors = {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in sizes.items()}
    harness.check(lambda backend, **t: ops.attention(**t, backend=backend), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((6, 40, 16), (3, 50, 16), (3, 50, 16)),
        ((2, 6, 40, 16), (1, 3, 50, 16), (1, 3, 50, 16)),
        ((2, 6, 40, 16), (3, 50, 16), (3, 50, 16)),
        ((2, 6, 40, 16), (2, 3, 50, 16), (2, 2, 50, 16)),
        ((2, 6, 40, 16), (2, 6, 50, 16), (2, 1, 50, 16)),
    ],
)
def test_grouped_heads_as_in_torch(query, key, value, backend):
    sizes = {"query": query, "key": key, "value": value}
    tensors = {n: torch.randn(s, dtype=torch.float64).requires_grad_() for n, s in sizes.items()}
    harness.check(
        lambda backend, **t: ops.attention(**t, enable_gqa=True, backend=backend), tensors, torch.float32, backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-3, 3.0])
def test_scale(scale, backend):
    """Not causal: torch multiplies its causal -inf by the scale, which gives NaN for scale <= 0."""
    harness.check(runner(scale=scale), make((1, 2, 2, 70, 70, 32, 32)), torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e2, 1e4])
def test_extreme_scores(size, backend):
    """1e4: the scores reach +-1e4 and nearly every row has a single key left."""
    tensors = make((2, 2, 2, 64, 90, 16, 16))
    with torch.no_grad():
        tensors["query"] *= size
    harness.check(runner(), tensors, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_rows_that_see_no_key_are_zero(dtype, backend):
    tensors = {n: t.to(dtype).detach().requires_grad_() for n, t in make((2, 2, 2, 30, 20, 16, 16)).items()}
    out = ops.attention(**tensors, is_causal=True, causal_alignment="bottom_right", backend=backend)
    assert not out[:, :, :10].any()  # queries 0..9 come before every key
    mask = torch.zeros(30, 20, dtype=torch.bool)
    for nothing in (mask, torch.full((30, 20), -math.inf)):
        out = ops.attention(**tensors, attn_mask=nothing, backend=backend)
        assert not out.any()
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), tuple(tensors.values())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 2, 5, 0, 8, 8), (2, 2, 2, 0, 5, 8, 8), (0, 2, 2, 5, 5, 8, 8), (2, 2, 2, 5, 6, 8, 0), (2, 2, 2, 5, 6, 0, 8)],
)
def test_empty_dimensions(shape, backend):
    for options in ({}, {"is_causal": True}):
        t = {n: x.detach().float().requires_grad_() for n, x in make(shape).items()}
        out = ops.attention(**t, backend=backend, **options)
        torch.testing.assert_close(out, ops.attention(**t, backend="torch", **options))
        gradients = torch.autograd.grad(out.sum(), tuple(t.values()))
        assert all(g.shape == x.shape and g.isfinite().all() for g, x in zip(gradients, t.values(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_its_own_rows_only(backend):
    query, key, value = (torch.randn(1, 1, 60, 16) for _ in range(3))
    query[0, 0, 7, 3] = math.nan
    out = ops.attention(query, key, value, is_causal=True, backend=backend)
    assert out[0, 0, 7].isnan().all()
    assert not out[0, 0, :7].isnan().any()
    assert not out[0, 0, 8:].isnan().any()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_causal_combines_with_a_mask_as_in_torch(mask_dtype):
    query, key, value = (torch.randn(2, 3, 33, 16) for _ in range(3))
    mask = torch.rand(33, 33) > 0.4 if mask_dtype == torch.bool else torch.randn(33, 33)
    expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=True)
    torch.testing.assert_close(ops.attention(query, key, value, mask, is_causal=True, backend="cpu"), expected)
    both = ops.attention(query, key, value, mask, is_causal=True, backend="torch")
    torch.testing.assert_close(both, expected)


def test_bottom_right_is_what_decoding_needs():
    """Queries that come one by one over a growing cache see what the whole sequence saw at once."""
    query, key, value = (torch.randn(2, 4, 50, 32) for _ in range(3))
    whole = ops.attention(query, key, value, is_causal=True)
    for step in (1, 2, 25, 49):
        part = ops.attention(query[:, :, step:], key, value, is_causal=True, causal_alignment="bottom_right")
        torch.testing.assert_close(part, whole[:, :, step:])


def test_mask_gradient_comes_from_the_reference():
    t = {n: torch.randn(2, 3, 8, 4, dtype=torch.float64) for n in ("query", "key", "value")}
    mask = torch.randn(3, 1, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m: ops.attention(**t, attn_mask=m, is_causal=True, backend="reference"), (mask,)
    )
    t, mask = harness.cast(t, torch.float32), mask.detach().float().requires_grad_()
    before = fastgpt.fallbacks().get(("attention", "an attn_mask that requires grad"), 0)
    ops.attention(**t, attn_mask=mask).sum().backward()
    assert mask.grad is not None
    assert fastgpt.fallbacks()["attention", "an attn_mask that requires grad"] == before + 1
    with torch.no_grad():
        ops.attention(**t, attn_mask=mask, backend="cpu")


@pytest.mark.parametrize("band", BANDS)
def test_gradcheck_of_the_formula(band):
    shape = {"query": (1, 4, 5, 3), "key": (1, 2, 6, 3), "value": (1, 2, 6, 2)}
    t = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shape.values()]
    mask = torch.rand(5, 6) > 0.3
    options = {**BANDS[band], "attn_mask": mask, "enable_gqa": True, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, **options), t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    q, k, v = (torch.randn(s, requires_grad=True) for s in ((2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 5)))
    mask = torch.rand(6, 7) > 0.3
    arguments = (mask.view(1, 1, 6, 7), None, None, None, 0.3, 0.0, 0, 3, 0, True)
    harness.opcheck("attention", (q, k, v, *arguments, backend))
    with torch.no_grad():
        out, lse = harness.raw("attention", q, k, v, *arguments, backend)
    t = [x.detach() for x in (torch.randn_like(out), q, k, v)]
    harness.opcheck("attention_backward", (*t, *arguments[:4], out, lse, *arguments[4:], False, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_merge_without_a_copy(backend):
    query, key, value = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    out = ops.attention(query, key, value, backend=backend)
    assert out.transpose(1, 2).is_contiguous()


def compare_compiled(compiler):
    t = harness.cast(make((2, 4, 2, 9, 12, 16, 16)), torch.float32)
    run = runner(is_causal=True, causal_alignment="bottom_right")
    compiled = torch.compile(lambda **t: run("cpu", **t), fullgraph=True, backend=compiler)
    upstream = [torch.randn(2, 4, 9, 16)]
    eager = harness.run_with_gradients(run, "cpu", t, upstream)
    graph = harness.run_with_gradients(lambda _, **t: compiled(**t), "cpu", t, upstream)
    harness.assert_same_bits([[*eager[0], *eager[1].values()], [*graph[0], *graph[1].values()]], "compiled differs")


def test_compiles_without_graph_breaks():
    compare_compiled("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor():
    compare_compiled("inductor")


def test_second_derivatives():
    """The reference has them; the kernel refuses by name instead of leaving its part out."""
    t = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.rand(4, 4) > 0.4
    mask[2] = False
    assert torch.autograd.gradgradcheck(lambda *t: ops.attention(*t, mask, backend="reference"), t)
    query, key, value = (x.detach().float().requires_grad_() for x in t)
    out = ops.attention(query, key, value, backend="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 333, 333, 40, 40), (1, 6, 2, 200, 500, 32, 32), (3, 2, 2, 100, 100, 16, 16)]
)
def test_bits_do_not_depend_on_threads(restore_threads, shape, dtype):
    """One head and several threads recompute the scores in two passes; the bits are those of one pass."""
    t = harness.cast(make(shape), dtype)
    upstream = [torch.randn(shape[0], shape[1], shape[3], shape[6])]
    run = runner(is_causal=True, causal_alignment="bottom_right")
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outputs, gradients = harness.run_with_gradients(run, "cpu", t, upstream)
        results.append([*outputs, *gradients.values()])
    harness.assert_same_bits(results, "the thread count changes the result")


def test_bits_do_not_depend_on_batch_neighbours():
    query, key, value = (torch.randn(5, 3, 70, 24) for _ in range(3))
    whole = ops.attention(query, key, value, is_causal=True, backend="cpu")
    alone = ops.attention(query[3:4], key[3:4], value[3:4], is_causal=True, backend="cpu")
    harness.assert_same_bits([[whole[3:4]], [alone]], "neighbours matter")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {n: torch.randn(2, 5, 8).double() for n in ("query", "key", "value")},
            "dtype torch.float64 (native kernels take float32, bfloat16, float16)",
        ),
        ({"query": torch.randn(2, 4, 257), "key": torch.randn(2, 5, 257)}, "a head dim above 256"),
        ({"value": torch.randn(2, 5, 300)}, "a head dim above 256"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference_openly(change, reason):
    t = {"query": torch.randn(2, 4, 8), "key": torch.randn(2, 5, 8), "value": torch.randn(2, 5, 8), **change}
    before = fastgpt.fallbacks().get(("attention", reason), 0)
    torch.testing.assert_close(ops.attention(**t), ops.attention(**t, backend="torch"))
    assert fastgpt.fallbacks()["attention", reason] == before + 1
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match="attention"):
        ops.attention(**t)
    with pytest.raises(NotImplementedError, match=r"backend='cpu' does not take"):
        ops.attention(**t, backend="cpu")


Q, K = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": "x"}, TypeError, r"query must be a Tensor, not str"),
        ({"query": Q.long()}, TypeError, r"query has dtype torch.int64; allowed are"),
        ({"key": K.half()}, TypeError, r"key has dtype torch.float16; it must be torch.float32, as query is"),
        ({"value": K.to("meta")}, ValueError, r"value is on meta, but query is on cpu"),
        ({"query": Q[0, 0, 0]}, ValueError, r"query has shape \(8,\); it must be \(\.\.\., heads, length, head dim\)"),
        ({"key": K[..., :7]}, ValueError, r"key has shape \(2, 2, 5, 7\); its last dimension must be 8"),
        ({"value": K[:, :, :4]}, ValueError, r"value has shape \(2, 2, 4, 8\).*must be 5"),
        ({"query": torch.ones(2, 5, 3, 8)}, ValueError, r"key has 2 heads, which must divide query's 5"),
        ({"enable_gqa": False}, ValueError, r"leading dimensions do not broadcast.*enable_gqa"),
        ({"key": K[:, :0], "value": K[:, :0]}, ValueError, r"key has 0 heads"),
        (
            {"attn_mask": torch.ones(3, 4)},
            ValueError,
            r"attn_mask has shape \(3, 4\); it must broadcast to \(2, 4, 3, 5\)",
        ),
        ({"attn_mask": torch.ones(7, 1, 1, 1, 1)}, ValueError, r"attn_mask has shape \(7, 1, 1, 1, 1\)"),
        ({"attn_mask": torch.ones(3, 5).half()}, TypeError, r"attn_mask has dtype torch.float16; allowed are bool"),
        ({"attn_mask": [True]}, TypeError, r"attn_mask must be a Tensor or None, not list"),
        ({"attn_mask": torch.ones(3, 5, device="meta")}, ValueError, r"attn_mask is on meta"),
        ({"dropout_p": 1.5}, ValueError, r"dropout_p=1.5 must lie between 0 and 1"),
        (
            {"causal_alignment": "right"},
            ValueError,
            r"causal_alignment='right'; allowed are 'top_left' and 'bottom_right'",
        ),
        ({"window": (1,)}, ValueError, r"window=\(1,\) must be \(left, right\)"),
        ({"window": (-2, 0)}, ValueError, r"window=\(-2, 0\)"),
        ({"window": (1.5, 0)}, ValueError, r"window=\(1.5, 0\)"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        ops.attention(**{"query": Q, "key": K, "value": K, "enable_gqa": True, **change})


sizes = st.lists(st.sampled_from([1, 1, 2, 3]), max_size=3)


@settings(max_examples=50)
@given(leads=st.tuples(sizes, sizes, sizes), mask=st.none() | sizes, gqa=st.booleans(), causal=st.booleans())
def test_any_shape_is_taken_or_refused_as_torch_does(leads, mask, gqa, causal):
    query_lead, key_lead, value_lead = leads
    if mask is not None:
        value_lead = key_lead  # torch broadcasts a mask with Q K^T only, ours with the result: more than torch takes
    query, key, value = torch.randn(*query_lead, 3, 4), torch.randn(*key_lead, 2, 4), torch.randn(*value_lead, 2, 4)
    mask = None if mask is None else torch.rand(*mask, 3, 2) > 0.3
    if causal and mask is not None:
        causal = False  # torch's unfused path refuses what its fused one combines
    try:
        expected = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=gqa)
    except (RuntimeError, IndexError):
        with pytest.raises(ValueError, match="attention: "):
            ops.attention(query, key, value, mask, is_causal=causal, enable_gqa=gqa)
    else:
        actual = ops.attention(query, key, value, mask, is_causal=causal, enable_gqa=gqa)
        torch.testing.assert_close(actual, expected)


@settings(max_examples=40)
@given(
    length=st.integers(1, 120),
    keys=st.integers(1, 250),
    dim=st.integers(1, 70),
    left=st.integers(-1, 260),
    right=st.integers(-1, 260),
    bottom_right=st.booleans(),
)
def test_any_size_and_window(length, keys, dim, left, right, bottom_right):
    alignment = "bottom_right" if bottom_right else "top_left"
    options = {"window": (left, right), "causal_alignment": alignment}
    t = make((1, 2, 2, length, keys, dim, dim))
    exact_inputs = harness.cast(t, torch.float64)
    t = harness.cast(exact_inputs, torch.float32)
    upstream = [torch.randn(1, 2, length, dim)]
    exact = harness.run_with_gradients(runner(**options), "torch", exact_inputs, upstream)
    actual = harness.run_with_gradients(runner(**options), "cpu", t, upstream)
    # One set of sizes is too small a sample for the budget: here a wrong edge must show, not the last digit.
    for a, e in zip([*actual[0], *actual[1].values()], [*exact[0], *exact[1].values()], strict=True):
        torch.testing.assert_close(a, e.float(), rtol=1e-4, atol=1e-4)
