import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import harness
from tests.ops.harness import ops
from tests.ops.test_attention_options import slopes

pytestmark = pytest.mark.few_interpreted

BACKENDS = harness.backends("attention_with_kvcache")
# (Hq, H, E, Ev)
HEADS = [(6, 2, 64, 64), (4, 4, 16, 16), (4, 1, 80, 80), (4, 1, 128, 128), (2, 2, 256, 256), (8, 2, 32, 48)]
LENGTHS = [150, 0, 1, 17, 64, 127, 3, 130, 90]
OPTIONS = {
    "all keys": lambda b, hq: {},
    "causal": lambda b, hq: {"is_causal": True},
    "window": lambda b, hq: {"is_causal": True, "window": (30, -1)},
    "softcap": lambda b, hq: {"is_causal": True, "softcap": 1.5},
    "alibi": lambda b, hq: {"is_causal": True, "alibi_slopes": slopes(b, hq)},
    "sinks": lambda b, hq: {"is_causal": True, "sinks": torch.linspace(-2, 2, hq)},
    "all": lambda b, hq: {
        "softcap": 2.0,
        "alibi_slopes": slopes(hq),
        "sinks": torch.linspace(-2, 2, hq),
        "window": (40, 2),
    },
}


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def make(heads, length, lengths=LENGTHS, capacity=160):
    hq, h, e, ev = heads
    batch = len(lengths)
    sizes = {"query": (batch, length, hq, e), "k_cache": (batch, capacity, h, e), "v_cache": (batch, capacity, h, ev)}
    return {name: torch.randn(size, dtype=torch.float64) for name, size in sizes.items()}


def paged(t, page_size):
    """The same cache in pages of a shuffled pool, with NaN in the pages that nobody owns, and the table.

    Entries of the table past a sequence's last key point nowhere.
    """
    batch, capacity = t["k_cache"].shape[:2]
    count = -(-capacity // page_size)
    pool = torch.randperm(batch * count + 3)
    table = pool[: batch * count].view(batch, count)
    pages = {}
    for name in ("k_cache", "v_cache"):
        whole = torch.nn.functional.pad(t[name], (0, 0, 0, 0, 0, count * page_size - capacity), value=math.nan)
        pages[name] = torch.full((len(pool), page_size, *whole.shape[2:]), math.nan, dtype=whole.dtype)
        pages[name][table] = whole.unflatten(1, (count, page_size))
    return {**t, **pages}, table.int()


def used(table, lengths, page_size):
    """The table with what lies past each sequence's last page made useless."""
    table = table.clone()
    for row, length in zip(table, lengths, strict=True):
        row[-(-length // page_size) :] = -1
    return table


def runner(option, heads, lengths=LENGTHS, **more):
    options = OPTIONS[option](len(lengths), heads[0])

    def run(backend, **t):
        with torch.no_grad():
            return ops.attention_with_kvcache(**t, cache_seqlens=int32(lengths), **options, **more, backend=backend)

    return run


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("length", [1, 3, 17])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_values(option, backend, length, dtype):
    for heads in HEADS[:2]:
        harness.check(runner(option, heads), make(heads, length), dtype, backend, gradients=False)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("heads", HEADS[2:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_dims(backend, heads, dtype):
    for length in (1, 5):
        for option in ("causal", "all"):
            harness.check(runner(option, heads), make(heads, length), dtype, backend, gradients=False)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("num_splits", [1, 2, 5, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_splits(backend, num_splits, dtype):
    """Without a window, and with one, which hides pieces."""
    for length, option in [(1, "causal"), (4, "all")]:
        run = runner(option, HEADS[0], num_splits=num_splits)
        harness.check(run, make(HEADS[0], length), dtype, backend, gradients=False)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("splits", [(0, -1), (2, -1), (64, -1), (64, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_unequal_weight(backend, splits, dtype):
    """The last key, which is the rest of a division by the pieces, or the first outweighs all others by more than a
    float holds. 64 pieces are more than a kernel adds up at once."""
    num_splits, heaviest = splits
    keys = 64 * 34 + 1
    t = make((2, 2, 16, 16), 1, (keys,), capacity=keys)
    t["query"].fill_(8.0)
    t["k_cache"].clamp_(max=-1.0)
    t["k_cache"][:, heaviest] = 8.0
    harness.check(runner("causal", (2, 2, 16, 16), (keys,), num_splits=num_splits), t, dtype, backend, gradients=False)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_pages_are_a_cache(option, backend, page_size):
    """The same numbers as without pages, whatever lies in other pages and past the end of the sequences."""
    heads = HEADS[0]
    for length in (1, 5):
        t = harness.cast(make(heads, length), torch.float32)
        expected = runner(option, heads)(backend, **t)
        pages, table = paged(t, page_size)
        for name in ("k_cache", "v_cache"):
            for row, end in zip(table, LENGTHS, strict=True):
                last = pages[name][row.long()].flatten(0, 1)
                last[end:] = math.nan
                pages[name][row.long()] = last.unflatten(0, (-1, page_size))
        actual = runner(option, heads, block_table=used(table, LENGTHS, page_size))(backend, **pages)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_in_every_dtype(backend, dtype):
    heads, option = HEADS[0], "all"
    t = harness.cast(make(heads, 2), dtype)
    pages, table = paged(t, 16)
    actual = runner(option, heads, block_table=table)(backend, **pages)
    torch.testing.assert_close(actual, runner(option, heads)(backend, **t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_sequences_may_share_pages(backend):
    heads = (2, 1, 16, 16)
    t = harness.cast(make(heads, 1, [20], 20), torch.float32)
    table = torch.arange(5, dtype=torch.int32)[None]
    pages = {n: t[n].view(5, 4, 1, 16) for n in ("k_cache", "v_cache")}
    query = t["query"].expand(2, 1, 2, 16)
    out = runner("causal", heads, [20, 20], block_table=table.expand(2, 5))(backend, query=query, **pages)
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[:1], runner("causal", heads, [20])(backend, **t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_past_the_length_is_not_read(backend):
    t = harness.cast(make(HEADS[1], 3), torch.float32)
    expected = runner("causal", HEADS[1])(backend, **t)
    for name in ("k_cache", "v_cache"):
        for row, length in zip(t[name], LENGTHS, strict=True):
            row[length:] = math.nan
    harness.assert_same_bits([[expected], [runner("causal", HEADS[1])(backend, **t)]], "read past the length")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_queries_that_see_no_key_are_zero(dtype, backend):
    """Sequence 1 has no key; of three queries the last one sees sequence 2's one key, which is its result."""
    t = harness.cast(make(HEADS[0], 3), dtype)
    out = runner("causal", HEADS[0])(backend, **t)
    assert not out[1].any()
    assert not out[2, :2].any()
    assert torch.equal(out[2, 2], t["v_cache"][2, 0].repeat_interleave(3, 0))
    assert out[0].any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", OPTIONS)
def test_is_attention_of_each_sequence(option, backend):
    heads = (4, 2, 16, 16)
    t = harness.cast(make(heads, 3), torch.float32)
    out = runner(option, heads)(backend, **t)
    options = {"causal_alignment": "bottom_right", "enable_gqa": True, **OPTIONS[option](len(LENGTHS), 4)}
    alibi = options.pop("alibi_slopes", None)
    for b, length in enumerate(LENGTHS):
        q, k, v = (x.transpose(0, 1) for x in (t["query"][b], t["k_cache"][b, :length], t["v_cache"][b, :length]))
        row = alibi if alibi is None or alibi.dim() == 1 else alibi[b]
        expected = ops.attention(q, k, v, **options, alibi_slopes=row, backend=backend)
        torch.testing.assert_close(out[b].transpose(0, 1), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize(("batch", "length", "capacity"), [(0, 1, 8), (2, 0, 8), (2, 1, 0), (2, 3, 8)])
def test_empty_dimensions(batch, length, capacity, page_size, backend):
    t = {
        "query": torch.randn(batch, length, 2, 8),
        "k_cache": torch.randn(batch, capacity, 1, 8),
        "v_cache": torch.randn(batch, capacity, 1, 8),
    }
    table = None
    if page_size:
        table = torch.zeros(batch, capacity // page_size, dtype=torch.int32)
        t |= {name: torch.randn(1, page_size, 1, 8) for name in ("k_cache", "v_cache")}
    out = runner("causal", (2, 1), [0] * batch, block_table=table)(backend, **t)
    assert out.shape == (batch, length, 2, 8)
    assert not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_neighbours(backend):
    for length in (1, 4):
        t = harness.cast(make(HEADS[0], length), torch.float32)
        whole = runner("causal", HEADS[0])(backend, **t)
        alone = runner("causal", HEADS[0], LENGTHS[5:6])(backend, **{n: x[5:6] for n, x in t.items()})
        harness.assert_same_bits([[whole[5:6]], [alone]], "neighbours matter")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_do_not_depend_on_the_capacity(dtype, backend):
    """Sequences of one piece: where all are, it is the result; where a longer one could be, it is a sum of one."""
    heads, longer = (4, 2, 16, 16), 600
    t = harness.cast(make(heads, 2), dtype)
    large = {n: x if n == "query" else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, longer - 160)) for n, x in t.items()}
    results = [runner("sinks", heads)(backend, **x) for x in (t, large)]
    harness.assert_same_bits([[r] for r in results], "the capacity matters")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    """A (B, H, S, D) cache seen as (B, S, H, D), a slice of a longer one, and odd addresses."""
    lengths = LENGTHS[:2] if backend == "triton" else LENGTHS  # whose interpreters take a second a call
    t = harness.cast(make(HEADS[0], 2, lengths), torch.float32)
    expected = runner("causal", HEADS[0], lengths)(backend, **t)
    for name in t:
        swapped = t[name].transpose(1, 2).contiguous().transpose(1, 2)
        longer = torch.nn.functional.pad(t[name], (0, 0, 0, 0, 3, 5))[:, 3:-5]
        for view in (swapped, longer, *(view for _, view in harness.layouts(t[name]))):
            torch.testing.assert_close(runner("causal", HEADS[0], lengths)(backend, **{**t, name: view}), expected)


@pytest.mark.parametrize("backend", harness.backends_without_interpreters("attention_with_kvcache"))
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    queries=st.integers(1, 20),
    dim=st.integers(1, 70),
    page_size=st.sampled_from([None, 1, 3, 16, 32]),
    left=st.integers(-1, 160),
    right=st.integers(-1, 20),
    num_splits=st.integers(0, 6),
    everything=st.booleans(),
)
def test_any_lengths(backend, lengths, queries, dim, page_size, left, right, num_splits, everything):
    t = make((4, 2, dim, dim), queries, lengths)
    options = {"window": (left, right), "num_splits": num_splits}
    if everything:
        options |= {"softcap": 3.0, "alibi_slopes": slopes(4), "sinks": torch.linspace(-2, 2, 4)}
    t = harness.cast(t, torch.float32)
    exact = runner("all keys", (4, 2), lengths, **options)("torch", **harness.cast(t, torch.float64))
    if page_size:
        t, table = paged(t, page_size)
        options["block_table"] = used(table, lengths, page_size)
    actual = runner("all keys", (4, 2), lengths, **options)(backend, **t)
    torch.testing.assert_close(actual, exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend == "triton"])
@pytest.mark.parametrize(
    "sizes",
    [
        ([1, 0, 150], 20, 70, 3, 160, -1, 6, False),
        ([129, 64], 1, 33, None, 60, 2, 0, False),
        ([63, 128, 65], 3, 16, 32, 40, 20, 2, True),
    ],
)
def test_some_lengths(sizes, backend):
    test_any_lengths.hypothesis.inner_test(backend, *sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    heads = (4, 2, 8, 8)
    t = harness.cast(make(heads, 2, [20, 7]), torch.float32)
    extras, numbers = (torch.randn(4), slopes(2, 4)), (0.3, 3.0, 0, 9, 0, True, 0, backend)
    harness.opcheck("attention_with_kvcache", (*t.values(), int32([20, 7]), None, *extras, *numbers))
    pages, table = paged(t, 16)
    harness.opcheck("attention_with_kvcache", (*pages.values(), int32([20, 7]), table, *extras, *numbers))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_without_graph_breaks(backend):
    heads = (4, 2, 8, 8)
    t, table = paged(harness.cast(make(heads, 2, [20, 7]), torch.float32), 16)
    run = runner("causal", heads, [20, 7], block_table=table)
    compiled = torch.compile(lambda **t: run(backend, **t), fullgraph=True, backend="aot_eager")
    harness.assert_same_bits([[run(backend, **t)], [compiled(**t)]], "compiled differs")


def test_there_is_no_gradient():
    for name in ("query", "k_cache", "v_cache"):
        t = harness.cast(make(HEADS[0], 1), torch.float32)
        t[name].requires_grad_()
        with pytest.raises(NotImplementedError, match=f"attention_with_kvcache: {name} requires grad, but there is no"):
            ops.attention_with_kvcache(**t, cache_seqlens=int32(LENGTHS))
        with torch.no_grad():
            ops.attention_with_kvcache(**t, cache_seqlens=int32(LENGTHS))


Q, K, N = torch.ones(2, 1, 4, 8), torch.ones(2, 16, 2, 8), int32([3, 16])
PAGES, TABLE = torch.ones(5, 4, 2, 8), int32([[0, 1, 2, 3], [4, 0, 0, 0]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, r"query has shape \(1, 4, 8\); it must be \(B, T, heads, head dim\)"),
        ({"query": Q.long()}, TypeError, r"query has dtype torch.int64"),
        ({"k_cache": K[0]}, ValueError, r"k_cache has shape \(16, 2, 8\); it must be \(B, S, heads, head dim\)"),
        ({"k_cache": K.half()}, TypeError, r"k_cache has dtype torch.float16"),
        ({"k_cache": K[..., :4]}, ValueError, r"k_cache has shape .* its last dimension must be 8"),
        ({"v_cache": K[:, :9]}, ValueError, r"v_cache has shape .* it must be \(2, 16, 2, head dim\), as k_cache is"),
        ({"query": Q[:, :, :3]}, ValueError, r"k_cache has 2 heads, which must divide query's 3"),
        ({"query": Q[:1], "cache_seqlens": N[:1]}, ValueError, r"k_cache has 2 sequences; it must have query's 1"),
        ({"cache_seqlens": 3}, TypeError, r"cache_seqlens must be a Tensor, not int"),
        ({"cache_seqlens": N.long()}, TypeError, r"cache_seqlens has dtype torch.int64; it must be torch.int32"),
        ({"cache_seqlens": N[:1]}, ValueError, r"cache_seqlens has shape \(1,\); it must be \(2,\)"),
        ({"cache_seqlens": N.to("meta")}, ValueError, r"cache_seqlens is on meta"),
        ({"cache_seqlens": int32([3, 17])}, ValueError, r"cache_seqlens\[1\]=17 must lie between 0 and the cache's 16"),
        ({"cache_seqlens": int32([-1, 3])}, ValueError, r"cache_seqlens\[0\]=-1 must lie between"),
        ({"block_table": TABLE}, ValueError, r"block_table\[0, 2\]=2 must lie between 0 and 1"),
        ({"block_table": TABLE[0]}, ValueError, r"block_table has shape \(4,\); it must have 2 dimensions"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table has 1 rows; it must have query's 2"),
        ({"block_table": TABLE.long()}, TypeError, r"block_table has dtype torch.int64"),
        ({"window": (3,)}, ValueError, r"window=\(3,\)"),
        ({"softcap": -1.0}, ValueError, r"softcap=-1.0"),
        ({"alibi_slopes": torch.ones(2)}, ValueError, r"alibi_slopes has shape \(2,\)"),
        ({"num_splits": -1}, ValueError, r"num_splits=-1 must be an integer >= 0"),
        ({"backend": "gpu"}, ValueError, r"backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"query": Q, "k_cache": K, "v_cache": K, "cache_seqlens": N, **change}
    if "block_table" in change and change["block_table"] is TABLE:
        pages = torch.ones(2, 4, 2, 8)
        arguments |= {"k_cache": pages, "v_cache": pages, "cache_seqlens": int32([12, 3])}
    with pytest.raises(error, match="attention_with_kvcache: " + message):
        ops.attention_with_kvcache(**arguments)
