"""The kernels agree with each other: C++ on the CPU, CUDA C++ on the emulator and Triton, from the same inputs.

Each is within its budget of the exact result (the operators' own suites), so two of them are within twice that of each
other. What must not differ at all: the weights that dropout drops, and the tokens that ``sample`` draws.
"""

import itertools

import pytest
import torch

from fastgpt.ops import native, philox
from fastgpt.ops.accuracy import error_and_budget
from tests.ops import harness
from tests.ops.harness import ops
from tests.ops.test_sample import FILTERS, PENALTIES

KERNELS = ("cpu", "simt", "triton")


def pairs(op):
    here = [backend for backend in KERNELS if native.has_kernel(backend, op)]
    return list(itertools.combinations(here, 2))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


# --- values and gradients ---


def layer_norm(backend, x, weight, bias, residual):
    return ops.layer_norm(x, (123,), weight, bias, residual=residual, backend=backend)


def rms_norm(backend, x, weight, residual):
    return ops.rms_norm(x, (123,), weight, residual=residual, backend=backend)


def gelu(backend, x, bias):
    return ops.gelu(x, bias=bias, backend=backend), ops.gelu(x, "tanh", backend=backend)


def swiglu(backend, gate, up):
    return ops.swiglu(gate, up, backend=backend)


def rotary(backend, x):
    cos, sin = ops.rotary_tables(40, 16)
    offsets = torch.tensor([3, 0])
    return ops.rotary(x, cos.to(x.dtype), sin.to(x.dtype), offsets=offsets, backend=backend)


def embedding(backend, weight, position_weight):
    tokens = torch.arange(60).view(3, 20) * 7 % 31
    return ops.embedding(tokens, weight, position_weight=position_weight, position_offset=2, backend=backend)


def attention(backend, query, key, value):
    return ops.attention(
        query, key, value, is_causal=True, enable_gqa=True, window=(20, 0), causal_alignment="bottom_right",
        backend=backend,
    )  # fmt: skip


TARGETS = torch.arange(37) * 11 % 203


def cross_entropy(backend, x):
    targets = TARGETS.where(TARGETS % 5 > 0, -100)
    return ops.cross_entropy(x, targets, label_smoothing=0.1, z_loss=1e-3, backend=backend)


def linear_cross_entropy(backend, x, weight):
    return ops.linear_cross_entropy(x, weight, TARGETS, z_loss=1e-3, backend=backend)


def adamw(backend, params, grads, exp_avgs, exp_avg_sqs):
    tensors = [t.detach().clone() for t in (params, grads, exp_avgs, exp_avg_sqs.abs())]
    norm = ops.adamw(*([t] for t in tensors), step=3, lr=0.1, max_norm=1.0, backend=backend)
    return norm, tensors[0], tensors[2], tensors[3]


CASES = {
    layer_norm: {"x": (5, 123), "weight": (123,), "bias": (123,), "residual": (5, 123)},
    rms_norm: {"x": (5, 123), "weight": (123,), "residual": (5, 123)},
    gelu: {"x": (5, 123), "bias": (123,)},
    swiglu: {"gate": (5, 123), "up": (5, 123)},
    rotary: {"x": (2, 3, 17, 24)},
    embedding: {"weight": (31, 48), "position_weight": (40, 48)},
    attention: {"query": (2, 4, 37, 32), "key": (2, 2, 45, 32), "value": (2, 2, 45, 32)},
    cross_entropy: {"x": (37, 203)},
    linear_cross_entropy: {"x": (37, 24), "weight": (203, 24)},
    adamw: {"params": (1003,), "grads": (1003,), "exp_avgs": (1003,), "exp_avg_sqs": (1003,)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "backend", "other"),
    [(case, *pair) for case in CASES for pair in pairs(case.__name__)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_values_and_gradients(case, backend, other, dtype):
    if case is adamw and dtype != torch.float32:
        pytest.skip("its state is float32 whatever the parameters are")
    inputs = harness.cast({name: normal(*shape) for name, shape in CASES[case].items()}, dtype)
    exact_inputs = harness.cast(inputs, torch.float64)
    with torch.no_grad():
        shapes = [o.shape for o in harness.tensors_of(case("torch", **exact_inputs))]
    upstream = None if case is adamw else [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]

    def results(backend, tensors):
        outputs, gradients = harness.run_with_gradients(case, backend, tensors, upstream)
        return [*outputs, *gradients.values()]

    exact, plain = results("torch", exact_inputs), results("torch", harness.cast(inputs, dtype))
    one, two = results(backend, harness.cast(inputs, dtype)), results(other, harness.cast(inputs, dtype))
    assert len(one) == len(two) == len(exact)
    for a, b, p, e in zip(one, two, plain, exact, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        _, budget = error_and_budget(a, p, e)
        difference = (a.double() - b.double()).abs().max().item()
        assert difference <= 2 * budget, (
            f"{backend} and {other} differ by {difference:.3e}, allowed is {2 * budget:.3e}"
        )


@pytest.mark.parametrize("backend", ["reference", *(b for b in KERNELS[1:] if native.has_kernel(b, "attention"))])
@pytest.mark.parametrize("shape", [(2, 3, 21, 43), (1, 2, 1, 64), (1, 1, 70, 9)])
def test_dropout_drops_the_same_weights(shape, backend):
    """Equal scores and the unit matrix for values: the output is the weights themselves."""
    batch, heads, queries, keys = shape
    q, k = torch.zeros(batch, heads, queries, 64), torch.zeros(batch, heads, keys, 64)
    value = torch.eye(keys, 64).expand(batch, heads, keys, 64)
    for seed in (7, -1, 2**40 + 5):
        out = ops.attention(q, k, value, dropout_p=0.3, dropout_seed=torch.tensor([seed]), backend=backend)
        numbers = philox.dropout_values(torch.tensor([seed]), 0, batch * heads, queries, keys)
        kept = (numbers >= round(0.3 * 65536)).view(shape)
        assert torch.equal(out[..., :keys] > 0, kept)


# --- sample: the same tokens ---


def by_row(rows, filters=FILTERS):
    """The filters in turn, one value a row of every option."""
    default = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = {name: [filters[i % len(filters)].get(name, off) for i in range(rows)] for name, off in default.items()}
    return {n: torch.tensor(c, dtype=torch.int64 if n == "top_k" else torch.float64) for n, c in columns.items()}


def assert_same_tokens(backend, logits, **options):
    expected, expected_log_prob = ops.sample(logits, **options, backend="cpu")
    token, log_prob = ops.sample(logits, **options, backend=backend)
    assert torch.equal(token, expected)
    harness.assert_same_bits([[expected_log_prob], [log_prob]], f"{backend}'s log_prob")


SAMPLERS = [backend for backend in KERNELS[1:] if native.has_kernel(backend, "sample")]


# 10,000 draws, over all options at once, with and without penalties and bias.
@pytest.mark.parametrize("backend", SAMPLERS)
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(3500, 13), (1200, 65), (280, 300), (18, 2047), (2, 5003)])
def test_the_same_10000_tokens(rows, vocab, extra, backend):
    """Together 10,000 draws for every backend."""
    options = {"seed": torch.arange(rows) * 977 - 5, "position": torch.arange(rows) % 7}
    if extra:
        options |= {"previous_tokens": torch.randint(-1, vocab, (rows, 30)), "logit_bias": torch.randn(vocab)}
        options |= PENALTIES
    assert_same_tokens(backend, torch.randn(rows, vocab) * 3, **options, **by_row(rows))


@pytest.mark.parametrize("backend", SAMPLERS)
@pytest.mark.parametrize("dtype", harness.FLOATS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 2048, 2049, 9001])
def test_the_same_tokens_of_any_vocabulary(vocab, dtype, backend):
    """Below and above what a tile of a Triton kernel holds; in 16 bits ties are the rule."""
    filters = [FILTERS[6], FILTERS[8], {"temperature": 0.0}, {"top_k": 5000, "top_p": 0.9}, {"min_p": 0.01}]
    assert_same_tokens(backend, (torch.randn(5, vocab) * 3).to(dtype), **by_row(5, filters))


HOSTILE = {
    "flat": torch.zeros(9001),
    "rising": torch.arange(9001.0) / 1e4,
    "falling": -torch.arange(9001.0) / 1e4,
    "falling far": -torch.arange(9001.0) / 1e2,
    "nearly flat": torch.randn(9001, generator=torch.Generator().manual_seed(1)) * 1e-4,
    "masked": torch.where(torch.arange(9001) % 1000 == 7, torch.arange(9001) / 1e4, -1e30),
    "four left": torch.where(torch.arange(9001) > 3, -torch.inf, 1.0),
    "zeros of both signs": torch.where(torch.arange(9001) % 2 == 1, 0.0, -0.0),
    "extremes": torch.tensor([-3e38, 3e38, 0.0, -0.0, 1e-45, -1e-45]),
    "few zeros": torch.tensor([-0.0, 0.0, -1e-45, -0.0]),
}


@pytest.mark.parametrize("backend", SAMPLERS)
@pytest.mark.parametrize("logits", HOSTILE.values(), ids=HOSTILE)
def test_the_same_tokens_of_hostile_logits(logits, backend):
    """More survivors than lists hold, ties at every threshold, ranges that thresholds were not made for."""
    filters = [{"top_k": 8500}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.5}, {"min_p": 0.2}, {"top_k": 1}]
    filters += [{"top_k": 8500, "top_p": 0.99, "temperature": 1e-30}, {"temperature": 1e30, "top_p": 0.5, "min_p": 0.5}]
    filters += [{"temperature": 0.0}]
    assert_same_tokens(backend, logits.expand(len(filters), -1), **by_row(len(filters), filters))


@pytest.mark.slow
@pytest.mark.parametrize("backend", SAMPLERS)
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", harness.FLOATS)
def test_the_same_60000_tokens(dtype, extra, backend):
    rows = 10000
    options = {"previous_tokens": torch.randint(-1, 65, (rows, 40)), **PENALTIES} if extra else {}
    assert_same_tokens(backend, (torch.randn(rows, 65) * 3).to(dtype), seed=5, **options, **by_row(rows))
