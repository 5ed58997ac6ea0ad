import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastgpt
from tests.ops import harness, statistics
from tests.ops.harness import ops

BACKENDS = harness.backends("sample")
EVERYONE = (*BACKENDS, "torch")
HERE = harness.backends_here("sample")
# The emulator and the runners of Triton are too slow for tens of thousands of draws; their every bit is compared with
# the CPU's elsewhere.
FAST = [backend for backend in EVERYONE if backend not in ("simt", "triton")]
cuda_kernel = pytest.mark.skipif("simt" not in HERE, reason="this build has no emulator (FASTGPT_SIMT=on)")
INF = math.inf

FILTERS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_p": 0.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.1},
]
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}


def distribution(x, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The exact distribution of one row, token by token, in Python's floats."""
    x = [float(v) for v in x]
    best = max(x)
    w = [math.exp((v - best) / temperature) for v in x]
    kept = set(range(len(x)))
    if top_k:
        threshold = sorted(x, reverse=True)[min(top_k, len(x)) - 1]
        kept = {i for i in kept if x[i] >= threshold}
    if top_p < 1:
        total, mass, chosen = sum(w[i] for i in kept), 0.0, set()
        for value in sorted({x[i] for i in kept}, reverse=True):
            if mass < top_p * total:
                equal = {i for i in kept if x[i] == value}
                chosen |= equal
                mass += sum(w[i] for i in equal)
        kept = chosen
    kept = {i for i in kept if w[i] >= min_p}
    total = sum(w[i] for i in kept)
    return torch.tensor([w[i] / total if i in kept else 0.0 for i in range(len(x))], dtype=torch.float64)


# --- the same token everywhere ---


def assert_same_draws(backends, what, *args, **options):
    """Every backend gives the first one's token, and its log_prob to the bit (but for a GPU's own logarithm)."""
    expected, expected_log_prob = ops.sample(*args, **options, backend=backends[0])
    for backend in backends[1:]:
        token, log_prob = ops.sample(*args, **options, backend=backend)
        assert torch.equal(token, expected), f"{what} {options}: {backend} draws other tokens than {backends[0]}"
        if backend == "cuda":
            torch.testing.assert_close(log_prob, expected_log_prob, atol=1e-7, rtol=2.4e-7)
        else:
            harness.assert_same_bits([[expected_log_prob], [log_prob]], f"{what} {options}: {backend}'s log_prob")


@pytest.mark.parametrize("options", FILTERS)
def test_kernel_and_reference_agree_on_every_bit_of_10000_draws(options):
    logits = torch.randn(10000, 65) * 3
    assert_same_draws([b for b in HERE if b != "simt"], "", logits, seed=3, **options)


@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("vocab", [1, 17, 1025, 50257])
def test_every_instruction_set_gives_the_same_bits(isa, vocab, dtype):
    logits = (torch.randn(2, vocab) * 3).to(dtype)
    everything = {"previous_tokens": torch.randint(-1, vocab, (2, 40)), "logit_bias": torch.randn(vocab), **PENALTIES}
    filters = FILTERS[::2] if vocab > 10000 else FILTERS  # the reference sorts: slow on large vocabularies
    for options in (*filters, {"top_k": 2000}, {"top_k": vocab}, {"temperature": 1e30, "top_p": 0.5, "min_p": 0.5}):
        for extra in ({}, everything):
            results = [list(ops.sample(logits, **options, **extra, backend=b)) for b in ("reference", "cpu")]
            harness.assert_same_bits(results, f"{isa}: {options} {list(extra)} differs")


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(40000),
        torch.arange(40000.0) / 1e4,
        -torch.arange(40000.0) / 1e4,
        torch.randn(40000, generator=torch.Generator().manual_seed(1)) * 1e-4,
        torch.where(torch.arange(40000) % 1000 == 7, torch.arange(40000) / 1e4, -1e30),
        torch.where(torch.arange(40000) > 3, -INF, 1.0),
        torch.tensor([-3e38, 3e38, 0.0, -0.0, 1e-45, -1e-45]),
    ],
    ids=["flat", "rising", "falling", "nearly flat", "masked", "four left", "extremes"],
)
def test_hostile_orders_and_ranges(logits):
    for options in FILTERS:
        assert_same_draws([b for b in HERE if b != "simt"], "", logits.expand(2, -1), **options)


# --- the CUDA kernel, on the emulator ---


def everything_for(rows, vocab):
    """Penalties and a bias, which make the kernel work on a row of its own."""
    return {"previous_tokens": torch.randint(-1, vocab, (rows, 40)), "logit_bias": torch.randn(vocab), **PENALTIES}


@cuda_kernel
@pytest.mark.parametrize("number", range(len(FILTERS)))
def test_cuda_kernel_draws_the_same_tokens(number):
    """Over all options 11,000 draws, dtypes and penalties in turn. Rows of odd length start at every alignment."""
    dtype = harness.FLOATS[number % 3]
    logits = (torch.randn(1000, 65) * 3).to(dtype)
    extra = everything_for(1000, 65) if number % 2 else {}
    assert_same_draws(["cpu", "simt"], dtype, logits, seed=number, **FILTERS[number], **extra)


@cuda_kernel
@pytest.mark.slow
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("options", FILTERS)
def test_cuda_kernel_draws_the_same_10000_tokens(options, dtype, extra):
    logits = (torch.randn(10000, 65) * 3).to(dtype)
    assert_same_draws(["cpu", "simt"], dtype, logits, seed=5, **options, **(everything_for(10000, 65) if extra else {}))


@cuda_kernel
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 512, 513, 1025, 8193, 50257])
def test_cuda_kernel_on_any_vocabulary(vocab, dtype):
    logits = (torch.randn(3, vocab) * 3).to(dtype)
    filters = [*FILTERS[:: 4 if vocab > 5000 else 1], {"top_k": 2000, "top_p": 0.9}]
    for options in (*filters, {"top_k": vocab - 1, "temperature": 1e30}):
        for extra in ({}, everything_for(3, vocab)):
            assert_same_draws(["cpu", "simt"], dtype, logits, **options, **extra)


@cuda_kernel
@pytest.mark.slow
def test_cuda_kernel_on_a_million_tokens():
    logits = torch.randn(1, 2**20)
    for options in ({}, {"temperature": 0.0}, {"top_k": 50, "top_p": 0.9}, {"top_k": 30000}, {"top_p": 0.9}):
        assert_same_draws(["cpu", "simt"], "", logits, **options)


@cuda_kernel
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(9001),
        torch.arange(9001.0) / 1e4,
        -torch.arange(9001.0) / 1e4,
        torch.randn(9001, generator=torch.Generator().manual_seed(1)) * 1e-4,
        torch.where(torch.arange(9001) % 1000 == 7, torch.arange(9001) / 1e4, -1e30),
        torch.where(torch.arange(9001) > 3, -INF, 1.0),
        torch.tensor([-3e38, 3e38, 0.0, -0.0, 1e-45, -1e-45]),
        torch.tensor([-0.0, 0.0, -1e-45, -0.0]),
    ],
    ids=["flat", "rising", "falling", "nearly flat", "masked", "four left", "extremes", "zeros"],
)
def test_cuda_kernel_when_too_many_survive_for_shared_memory(logits):
    """Just over what the kernel can hold there, in orders and ranges that its bins and bounds were not made for."""
    for options in (*FILTERS, {"top_k": 8500}, {"top_k": 8500, "top_p": 0.99, "temperature": 1e-30}):
        assert_same_draws(["cpu", "simt"], "", logits.expand(2, -1), **options)


@cuda_kernel
def test_cuda_kernel_under_every_schedule(every_schedule):
    for vocab in (300, 9001):
        logits = (torch.randn(3, vocab) * 3).bfloat16()
        for options in ({}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}, {"top_p": 0.95}):
            assert_same_draws(["cpu", "simt"], "", logits, **options)
            assert_same_draws(["cpu", "simt"], "", logits, **options, **everything_for(3, vocab))


@pytest.mark.parametrize("options", FILTERS)
def test_plain_torch_draws_the_same_tokens(options):
    """torch's own softmax, sort and cumsum differ in the last bits: from one seed, nearly always the same token."""
    logits = torch.randn(2000, 65) * 3
    ours, theirs = (ops.sample(logits, **options, backend=backend)[0] for backend in ("reference", "torch"))
    assert (ours != theirs).sum() <= 1


# --- the distribution ---


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", [o for o in FILTERS if o.get("temperature") != 0])
def test_tokens_follow_the_exact_distribution(options, backend):
    logits = torch.randn(50) * 2
    exact = distribution(logits, **options)
    count = 20000
    rows = logits.expand(count, -1)
    one_by_one = torch.arange(count)
    for key in ({"row": one_by_one}, {"position": one_by_one, "row": 0}, {"seed": one_by_one, "row": 0}):
        token, _ = ops.sample(rows, **options, **key, backend=backend)
        statistics.assert_follows(token, exact, tests=3 * len(FILTERS) * len(EVERYONE))
        possible = (exact > 1e-3).nonzero().flatten().tolist()  # 20000 draws miss one with probability 2e-9
        assert set(possible) <= set(token.tolist()), "something likely was never drawn"


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b in FAST])
def test_draws_are_independent_over_neighbouring_rows_positions_and_seeds(backend):
    logits = torch.tensor([1.0, 0.0, 0.5, -1.0])
    exact = distribution(logits)
    pairs = torch.outer(exact, exact).flatten()
    one_by_one = torch.arange(40001)
    for key in ({"row": one_by_one}, {"position": one_by_one, "row": 0}, {"seed": one_by_one, "row": 0}):
        token, _ = ops.sample(logits.expand(40001, -1), **key, backend=backend)
        statistics.assert_follows(token[:-1][::2] * 4 + token[1:][::2], pairs, tests=3 * len(BACKENDS))


@pytest.mark.parametrize("backend", EVERYONE)
@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1, 2}),  # 1 and 2 tie for the second place: both stay
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_k": 4}, {0, 1, 2, 3}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 1000}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.39}, {0}),  # the probabilities are 8, 4, 4, 2, 1, 1 of 20
        ({"top_p": 0.41}, {0, 1, 2}),  # one of the ties would do: both stay
        ({"top_p": 0.79}, {0, 1, 2}),
        ({"top_p": 0.81}, {0, 1, 2, 3}),
        ({"top_p": 0.91}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.49}, {0, 1, 2}),
        ({"min_p": 0.51}, {0}),
        ({"min_p": 0.12}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 3, "top_p": 0.51}, {0, 1, 2}),  # renormalised after top-k: 0 holds 8 of 16
        ({"top_k": 3, "top_p": 0.49}, {0}),
        ({"temperature": 0.5, "top_p": 0.6}, {0}),  # squared: 64 of 102
        ({"temperature": 0.0, "top_k": 4}, {0}),
    ],
)
def test_filters_keep_exactly_the_right_tokens(options, support, backend):
    logits = torch.tensor([8.0, 4.0, 4.0, 2.0, 1.0, 1.0]).log()
    token, _ = ops.sample(logits.expand(1000, -1), **options, backend=backend)
    assert set(token.tolist()) == support


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({"top_p": 0.5}, {0}),
        ({"top_p": math.nextafter(0.5, 1)}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": math.nextafter(0.75, 1)}, {0, 1, 2, 3}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": math.nextafter(0.5, 1)}, {0}),
        ({"min_p": math.nextafter(0.25, 0)}, {0, 1, 2, 3}),
    ],
)
def test_boundaries_are_exact(options, support, backend):
    """At this temperature the weights are powers of two, without rounding: 1/2, 1/4, 1/8, 1/8 of the whole."""
    logits = torch.tensor([0.0, -1.0, -2.0, -2.0])
    token, _ = ops.sample(logits.expand(200, -1), temperature=math.log2(math.e), **options, backend=backend)
    assert set(token.tolist()) == support


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("options", FILTERS)
def test_log_prob_within_the_budget(options, dtype, backend):
    previous = torch.randint(0, 300, (40, 20))

    def run(backend, logits, bias):
        return ops.sample(
            logits, **options, previous_tokens=previous, logit_bias=bias, **PENALTIES, seed=5, backend=backend
        )[1]

    tensors = {"logits": torch.randn(40, 300, dtype=torch.float64) * 3, "bias": torch.randn(300, dtype=torch.float64)}
    harness.check(run, tensors, dtype, backend, gradients=False)


@pytest.mark.parametrize("backend", EVERYONE)
def test_greedy_takes_the_lowest_of_equals_and_reports_its_softmax(backend):
    logits = torch.randn(4, 3000).clamp(max=2.0)
    token, log_prob = ops.sample(logits, temperature=0, top_k=3, top_p=0.1, backend=backend)
    assert token.tolist() == [(row == 2.0).nonzero()[0].item() for row in logits]
    exact = logits.double().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob.double(), exact, atol=2e-6, rtol=0)


# --- penalties, bias, Hugging Face ---


@pytest.mark.parametrize("backend", FAST)
def test_penalties_by_hand(backend):
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    options = {"previous_tokens": [[0, 1, 0, -1]], **PENALTIES, "logit_bias": torch.tensor([0.0, 0.1, -INF, -9.0])}
    expected = torch.tensor([2 / 1.3 - 0.4 - 0.2 * 2, -1 * 1.3 - 0.4 - 0.2 + 0.1, -INF, 3.0 - 9.0])
    exact = expected.double().softmax(-1)
    count = 5000
    options["previous_tokens"] = options["previous_tokens"] * count
    token, log_prob = ops.sample(logits.expand(count, -1), **options, backend=backend)
    statistics.assert_follows(token, exact, tests=len(EVERYONE))
    torch.testing.assert_close(log_prob.double(), exact.log()[token], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [o for o in FILTERS if o.get("temperature") != 0])
def test_against_hugging_face(options, backend):
    hf = pytest.importorskip("transformers", reason="an oracle here, not a dependency").generation.logits_process
    logits = torch.randn(500, 300) * 3
    previous = torch.randint(0, 300, (500, 30))
    processors = [hf.RepetitionPenaltyLogitsProcessor(1.3)]
    if "temperature" in options:
        processors.append(hf.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(hf.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(hf.MinPLogitsWarper(options["min_p"]))
    scores = logits.double()
    for processor in processors:
        scores = processor(previous, scores)
    token, log_prob = ops.sample(logits, previous_tokens=previous, repetition_penalty=1.3, **options, backend=backend)
    theirs = scores.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    # A wrong support would show in the normalisation of every row.
    torch.testing.assert_close(log_prob.double(), theirs, atol=1e-5, rtol=1e-6)


# --- what the result depends on ---


@pytest.mark.parametrize("backend", EVERYONE)
def test_options_by_row(backend):
    logits = torch.randn(6, 100)
    options = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0, 0.7]),
        "top_k": torch.tensor([0, 5, 100, 3, 0, 1000]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1.0, 0.3, 0.8], dtype=torch.float64),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.0, 0.2, 1.0]),
        "repetition_penalty": torch.tensor([1.0, 1.5, 0.8, 1.0, 2.0, 1.0]),
        "presence_penalty": torch.tensor([0.0, 1.0, -1.0, 0.0, 0.5, 0.0]),
        "frequency_penalty": torch.tensor([0.0, 0.5, 0.0, -0.5, 0.1, 0.0]),
        "seed": torch.tensor([1, 2, 3, 4, -5, 6]),
        "position": torch.tensor([0, 10, 20, 30, 40, 2**40]),
        "row": torch.tensor([9, 9, 9, 0, 1, 2]),
    }
    previous = torch.randint(-1, 100, (6, 12))
    bias = torch.randn(6, 100)
    together = ops.sample(logits, **options, previous_tokens=previous, logit_bias=bias, backend=backend)
    for i in range(6):
        alone = ops.sample(
            logits[i],
            **{name: value[i].item() for name, value in options.items()},
            previous_tokens=previous[i].tolist(),
            logit_bias=bias[i],
            backend=backend,
        )
        for whole, one in zip(together, alone, strict=True):
            assert one.dim() == 0
            assert whole[i] == one, f"row {i} depends on its neighbours"


def test_every_key_changes_the_draw():
    logits = torch.zeros(1, 2**20)
    keys = [{}, {"seed": 1}, {"seed": 2**32}, {"position": 1}, {"position": 2**32}, {"row": 1}]
    tokens = {ops.sample(logits, **key)[0].item() for key in keys}
    assert len(tokens) == len(keys)
    assert ops.sample(logits, seed=2**64 - 1)[0] == ops.sample(logits, seed=-1)[0]
    rows = ops.sample(logits.expand(3, -1))[0]
    assert torch.equal(rows, ops.sample(logits.expand(3, -1), row=torch.arange(3))[0])


def test_bits_do_not_depend_on_threads(restore_threads):
    logits = torch.randn(300, 2000)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(list(ops.sample(logits, top_p=0.9, backend="cpu")))
    harness.assert_same_bits(results, "the thread count changes the result")


# --- memory ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_untouched_inputs(backend):
    for name, view in harness.layouts(torch.randn(6, 40)):
        before = view.clone()
        expected = ops.sample(view.clone(memory_format=torch.contiguous_format), top_k=9, backend=backend)
        harness.assert_same_bits([list(expected), list(ops.sample(view, top_k=9, backend=backend))], name)
        assert torch.equal(view, before)
    last = torch.randn(3, 5, 40)[:, -1]  # the last position of a model's logits, without a copy
    previous, bias = torch.randint(0, 40, (8, 3)).T, torch.randn(40)
    kept = last.clone(), previous.clone(), bias.clone()
    options = {"previous_tokens": previous, "logit_bias": bias, **PENALTIES, "backend": backend}
    harness.assert_same_bits(
        [list(ops.sample(last.clone(), **options)), list(ops.sample(last, **options))], "strided rows"
    )
    assert all(map(torch.equal, kept, (last, previous, bias)))


@pytest.mark.parametrize("backend", EVERYONE)
def test_nothing_to_sample_and_nothing_to_choose(backend):
    token, log_prob = ops.sample(torch.empty(0, 5), backend=backend)
    assert (token.shape, token.dtype, log_prob.shape, log_prob.dtype) == ((0,), torch.int64, (0,), torch.float32)
    token, log_prob = ops.sample(torch.tensor([[-3.0]]), top_k=1, top_p=0.5, backend=backend)
    assert (token.tolist(), log_prob.tolist()) == ([0], [0.0])
    token, log_prob = ops.sample(torch.tensor([-INF, 1.0, -INF]), previous_tokens=[], backend=backend)
    assert (token.item(), log_prob.item()) == (1, 0.0)


def test_no_derivative():
    logits = torch.randn(2, 8, requires_grad=True)
    token, log_prob = ops.sample(logits, logit_bias=torch.zeros(8, requires_grad=True))
    assert not token.requires_grad
    assert not log_prob.requires_grad


# --- torch's machinery ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    reals = torch.tensor([[0.8, 0.9, 0.01, 1.1, 0.1, 0.1]], dtype=torch.float64)
    integers = torch.tensor([[5, 1, 2]])
    logits, previous, bias = torch.randn(3, 20), torch.randint(-1, 20, (3, 4)), torch.randn(3, 20)
    harness.opcheck("sample", (logits, reals, integers, None, None, None, backend))
    harness.opcheck("sample", (logits, reals, integers, torch.arange(3), previous, bias, backend))


def check_compiled(compiler):
    def step(logits, position, temperature, previous):
        return ops.sample(
            logits.float() * 2, temperature=temperature, top_k=5, top_p=0.9, seed=1, position=position,
            previous_tokens=previous, repetition_penalty=1.2,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    previous = torch.randint(0, 40, (4, 6))
    for position in (torch.full((4,), 3), 7, 8, 9):
        for temperature in (0.5, torch.tensor([0.0, 0.5, 1.0, 2.0])):
            arguments = (torch.randn(4, 40, dtype=torch.bfloat16), position, temperature, previous)
            harness.assert_same_bits([list(step(*arguments)), list(compiled(*arguments))], "compiled differs")


def test_compiles_without_graph_breaks():
    check_compiled("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor():
    check_compiled("inductor")


def test_fake_tensors():
    with FakeTensorMode():
        token, log_prob = ops.sample(torch.empty(4, 9), temperature=torch.ones(4), row=0, backend="cpu")
    assert (token.shape, token.dtype, log_prob.shape, log_prob.dtype) == ((4,), torch.int64, (4,), torch.float32)


def test_the_short_way_gives_what_the_long_one_does():
    """Numbers for options and an ordinary tensor go past the dispatcher; a tensor of the same values does not."""
    for options in FILTERS:
        for dtype in harness.FLOATS:
            for logits in (
                torch.randn(3, 300) * 3,
                torch.randn(300),
                torch.randn(3, 400)[:, 50:350],
                torch.randn(1, 1),
            ):
                x = logits.to(dtype)
                rows = 1 if x.dim() == 1 else len(x)
                seed = torch.full((rows,), 5)
                short = ops.sample(x, **options, seed=5, position=2, backend="cpu")
                harness.assert_same_bits([[*short], [*ops.sample(x, **options, seed=seed, position=2)]], f"{options}")
                assert [t.shape for t in short] == [x.shape[:-1]] * 2


def test_what_looks_at_operators_sees_sample():
    logits = torch.randn(2, 50)
    with torch.profiler.profile() as profile:
        ops.sample(logits)
    assert any(event.key == "fastgpt::sample" for event in profile.key_averages())
    graph = make_fx(lambda x: ops.sample(x)[0])(logits)
    assert "fastgpt.sample" in graph.code
    traced = torch.jit.trace(lambda x: ops.sample(x, seed=3)[0], logits)
    assert torch.equal(traced(-logits), ops.sample(-logits, seed=3)[0])
    each = torch.func.vmap(lambda x: ops.sample(x, temperature=0.0)[1])(logits)
    torch.testing.assert_close(each, ops.sample(logits, temperature=0.0)[1])
    turned = torch.complex(torch.zeros(2, 50), logits).conj().imag  # -logits, in a view that says so
    assert torch.equal(ops.sample(turned, seed=3)[0], ops.sample(-logits, seed=3)[0])


def test_float64_goes_to_the_reference_openly():
    logits = torch.randn(2, 8, dtype=torch.float64)
    token, _ = ops.sample(logits)
    assert token.shape == (2,)
    assert any(name == "sample" and "float64" in why for name, why in fastgpt.fallbacks())
    with fastgpt.strict(), pytest.raises(fastgpt.FallbackError, match=r"sample.*float64.*strict"):
        ops.sample(logits)


# --- bad input ---


@pytest.mark.parametrize("backend", EVERYONE)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": "x"}, TypeError, r"logits must be a Tensor, not str"),
        ({"logits": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"logits has dtype torch.int64"),
        ({"logits": torch.ones(2, 8, 3)}, ValueError, r"logits has shape \(2, 8, 3\); it must be \(N, V\) or \(V,\)"),
        ({"logits": torch.ones(2, 0)}, ValueError, r"logits has shape \(2, 0\)"),
        ({"logits": torch.ones(1).expand(2, 2**20 + 1)}, ValueError, r"V from 1 to 1048576"),
        ({"logit_bias": torch.ones(7)}, ValueError, r"logit_bias has shape \(7,\); it must be \(8,\) or \(2, 8\)"),
        ({"logit_bias": torch.ones(8, dtype=torch.int64)}, TypeError, r"logit_bias has dtype torch.int64"),
        ({"temperature": -0.1}, ValueError, r"temperature=-0.1; it must be finite and at least 0"),
        ({"temperature": math.nan}, ValueError, r"temperature=nan"),
        ({"temperature": INF}, ValueError, r"temperature=inf"),
        ({"temperature": "hot"}, TypeError, r"temperature must be a number or a tensor, not str \('hot'\)"),
        ({"temperature": True}, TypeError, r"temperature must be a number or a tensor, not bool"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature has shape \(3,\); it must be \(2,\)"),
        ({"top_p": 0.0}, ValueError, r"top_p=0.0; it must be in \(0, 1\]"),
        ({"min_p": 1.1}, ValueError, r"min_p=1.1; it must be in \[0, 1\]"),
        ({"repetition_penalty": 0}, ValueError, r"repetition_penalty=0.0; it must be finite and above 0"),
        ({"presence_penalty": INF}, ValueError, r"presence_penalty=inf; it must be finite"),
        ({"frequency_penalty": math.nan}, ValueError, r"frequency_penalty=nan; it must be finite"),
        ({"top_k": -1}, ValueError, r"top_k=-1; it must be at least 0"),
        ({"top_k": 5.0}, TypeError, r"top_k must be an int or a tensor, not float \(5.0\)"),
        ({"top_k": torch.tensor([1.0, 2.0])}, TypeError, r"top_k has dtype torch.float32; it must be an integer dtype"),
        ({"seed": 2**64}, ValueError, r"seed=18446744073709551616; it must fit into 64 bits"),
        ({"seed": 1.5}, TypeError, r"seed must be an int or a tensor, not float"),
        ({"position": -1}, ValueError, r"position=-1; it must be at least 0"),
        ({"row": -1}, ValueError, r"row=-1; it must be in \[0, 2\^32\)"),
        ({"previous_tokens": torch.zeros(2, 3)}, TypeError, r"previous_tokens has dtype torch.float32"),
        ({"previous_tokens": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"shape \(3, 1\); it must be \(2, L\)"),
    ],
)
def test_errors_name_argument_row_and_value(change, error, message, backend):
    with pytest.raises(error, match=message):
        ops.sample(**{"logits": torch.zeros(2, 8), "backend": backend, **change})


# Values in tensors, the message, the bad rows: refused, unless the tensors lie on a GPU, where nobody waits for them.
BAD_OPTIONS = [
    ({"temperature": torch.tensor([1.0, -2.0])}, r"temperature\[1\]=-2.0 \(row 1\)", [1]),
    ({"top_p": torch.tensor([0.5, 1.5])}, r"top_p\[1\]=1.5 \(row 1\); it must be in \(0, 1\]", [1]),
    ({"top_k": torch.tensor([5, -2])}, r"top_k\[1\]=-2 \(row 1\)", [1]),
    ({"row": torch.tensor([0, 2**32])}, r"row\[1\]=4294967296", [1]),
    ({"previous_tokens": torch.tensor([[0, 1], [8, 0]])}, r"previous_tokens\[1, 0\]=8; .* \[0, 8\)", [1]),
    ({"previous_tokens": [[-2], []]}, r"previous_tokens\[0, 0\]=-2", [0]),
]
# The same, but only the kernel sees them.
BAD_LOGITS = [
    ({"logits": torch.tensor([[0.0] * 8, [0, 0, 0, math.nan, 0, 0, 0, 0]])}, r"logits\[1, 3\]=nan", [1]),
    ({"logits": torch.tensor([[0.0] * 7 + [INF], [0.0] * 8])}, r"logits\[0, 7\]=inf \(row 0\)", [0]),
    ({"logits": torch.tensor([[0.0] * 8, [-INF] * 8])}, r"row 1 of logits leaves no token", [1]),
    ({"logit_bias": torch.full((8,), -INF)}, r"row 0 of logits leaves no token", [0, 1]),
    ({"logit_bias": torch.tensor([0.0] * 7 + [INF])}, r"logit_bias\[0, 7\]=inf", [0, 1]),
    ({"logit_bias": torch.full((8,), math.nan)}, r"logit_bias\[0, 0\]=nan", [0, 1]),
    ({"logits": torch.full((2, 8), 3e38), "logit_bias": torch.full((8,), 3e38)}, r"after penalties and", [0, 1]),
]


def assert_marked(backend, change, bad):
    """Token -1 and log_prob NaN in the bad rows; the others are drawn as if those were not there."""
    token, log_prob = ops.sample(**{"logits": torch.zeros(2, 8), "backend": backend, **change})
    assert [t < 0 for t in token.tolist()] == log_prob.isnan().tolist() == [i in bad for i in range(2)]
    assert all(t == -1 for t in token[bad])


@pytest.mark.parametrize("backend", EVERYONE)
@pytest.mark.parametrize(("change", "message", "bad"), BAD_OPTIONS)
def test_bad_options_by_row(change, message, bad, backend):
    if backend == "cuda":
        assert_marked(backend, change, bad)
    else:
        with pytest.raises(ValueError, match=message):
            ops.sample(**{"logits": torch.zeros(2, 8), "backend": backend, **change})


@cuda_kernel
@pytest.mark.parametrize(("change", "message", "bad"), BAD_OPTIONS)
def test_bad_options_in_device_memory_reach_nobody_but_their_row(change, message, bad, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastgpt.ops.sample"), "_on_host", lambda tensor: None)
    assert_marked("simt", change, bad)


@pytest.mark.parametrize("backend", EVERYONE)
@pytest.mark.parametrize(("change", "message", "bad"), BAD_LOGITS)
def test_bad_logits(change, message, bad, backend):
    if backend not in harness.SYNCHRONOUS and backend != "torch":
        assert_marked(backend, change, bad)
    else:
        with pytest.raises(ValueError, match=message):
            ops.sample(**{"logits": torch.zeros(2, 8), "backend": backend, **change})


LIMITS = {
    "temperature": lambda v: 0 <= v < INF,
    "top_p": lambda v: 0 < v <= 1,
    "min_p": lambda v: 0 <= v <= 1,
    "repetition_penalty": lambda v: 0 < v < INF,
    "presence_penalty": lambda v: abs(v) < INF,
    "frequency_penalty": lambda v: abs(v) < INF,
}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(LIMITS)),
    value=st.one_of(st.floats(), st.floats(-0.5, 1.5), st.sampled_from([0.0, 1.0, -0.0])),
    by_row=st.booleans(),
)
def test_any_option_is_taken_or_refused_by_name(name, value, by_row):
    good = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}.get(name, 0.0)
    option = torch.tensor([good, value], dtype=torch.float64) if by_row else value
    logits = torch.randn(2, 8)
    for backend in HERE:
        if LIMITS[name](value):
            token, log_prob = ops.sample(logits, **{name: option}, backend=backend)
            assert ((token >= 0) & (token < 8)).all()
            assert ((log_prob <= 1e-6) & (log_prob > -1e30)).all()
        elif by_row and backend == "cuda":
            assert_marked(backend, {"logits": logits, name: option}, [1])
        else:
            with pytest.raises(ValueError, match=rf"sample: {name}.*{'row 1' if by_row else ''}.*it must be"):
                ops.sample(logits, **{name: option}, backend=backend)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 80))
def test_any_row_agrees_with_the_distribution_written_out(data, vocab):
    """Random small integers as logits: ties everywhere. The token is possible, and its log_prob is the exact one."""
    logits = torch.tensor(data.draw(st.lists(st.integers(-4, 4), min_size=vocab, max_size=vocab)), dtype=torch.float32)
    options = {
        "temperature": data.draw(st.floats(0.3, 3)),
        "top_k": data.draw(st.integers(0, 90)),
        "top_p": data.draw(st.floats(0.01, 1)),
        "min_p": data.draw(st.floats(0, 1)),
    }
    results = [ops.sample(logits, **options, backend=backend) for backend in HERE]
    harness.assert_same_bits([list(result) for result in results], "backends differ")
    token, log_prob = results[0]
    exact = distribution(logits, **options)
    assert exact[token] > 0
    assert abs(log_prob.item() - math.log(exact[token])) < 1e-5
