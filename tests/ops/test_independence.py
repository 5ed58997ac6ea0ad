"""What the CPU kernels compute depends neither on the number of threads nor on what else is in the batch: the bits of
outputs and gradients, of every operator, on every instruction-set level.
"""

import pytest
import torch

from fastgpt.ops import registry
from tests.ops import harness
from tests.ops.harness import ops

BATCH, ALONE = 7, 4  # rows of the batch, and the one that is also computed alone


def randn(*sizes):
    return torch.randn(sizes).requires_grad_()


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention(**options):
    tensors = {"query": randn(BATCH, 4, 65, 24), "key": randn(BATCH, 2, 210, 24), "value": randn(BATCH, 2, 210, 40)}
    return lambda **t: ops.attention(**t, enable_gqa=True, backend="cpu", **options), tensors, {}


def attention_varlen():
    """A row of the batch is a sequence, each as long as the others here: neighbours, not lengths, are judged."""
    tensors = {"query": randn(BATCH, 65, 4, 24), "key": randn(BATCH, 210, 2, 24), "value": randn(BATCH, 210, 2, 40)}

    def run(query, key, value):
        where = [cumulative([t.shape[1]] * len(t)) for t in (query, key)]
        packed = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        out = ops.attention_varlen(*packed, *where, 65, 210, is_causal=True, backend="cpu")
        return out.view(len(query), 65, 4, 40)

    return run, tensors, {}


def attention_with_kvcache(num_splits):
    sizes = {"query": (BATCH, 2, 4, 24), "k_cache": (BATCH, 600, 2, 24), "v_cache": (BATCH, 600, 2, 24)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors["cache_seqlens"] = torch.tensor([600, 1, 0, 250, 511, 33, 64], dtype=torch.int32)

    def run(**t):
        return ops.attention_with_kvcache(**t, is_causal=True, num_splits=num_splits, backend="cpu")

    return run, tensors, {}


def norm(op, width, residual):
    tensors = {"input": randn(BATCH, 90, width)} | ({"residual": randn(BATCH, 90, width)} if residual else {})
    function, parameters = getattr(ops, op), {"weight": randn(width)}
    if op == "layer_norm":
        parameters["bias"] = randn(width)
    return lambda **t: function(normalized_shape=(width,), backend="cpu", **t), tensors, parameters


def cross_entropy():
    def run(input, target):
        return ops.cross_entropy(input.mT, target, reduction="none", z_loss=0.01, label_smoothing=0.1, backend="cpu")

    return run, {"input": randn(BATCH, 60, 501), "target": torch.randint(501, (BATCH, 60))}, {}


def embedding():
    """No token is in two rows of the batch, so that a token's gradient comes from one."""
    tokens = torch.stack([torch.randint(50, (400,)) + 50 * row for row in range(BATCH)])
    parameters = {"weight": randn(50 * BATCH, 96), "position_weight": randn(400, 96)}
    return lambda **t: ops.embedding(**t, backend="cpu"), {"input": tokens}, parameters


def sample():
    """Row i of a call draws with the counter of row i: its own seed says which row it is."""
    tensors = {"logits": torch.randn(BATCH, 5003), "seed": torch.arange(BATCH), "temperature": torch.rand(BATCH) + 0.5}
    return lambda **t: ops.sample(**t, top_k=50, top_p=0.9, row=0, backend="cpu"), tensors, {}


def elementwise(op, *names, **options):
    tensors = {name: randn(BATCH, 90, 211) for name in names}
    parameters = {"bias": randn(211)} if op == "gelu" else {}
    return lambda **t: getattr(ops, op)(**t, **options, backend="cpu"), tensors, parameters


def rotary(interleaved):
    tables = dict(zip(("cos", "sin"), ops.rotary_tables(90, 32), strict=True))
    tensors = {"input": randn(BATCH, 3, 90, 40), "offsets": torch.zeros(BATCH, dtype=torch.int64)}
    return lambda **t: ops.rotary(**t, **tables, interleaved=interleaved, backend="cpu"), tensors, {}


# (the operator, what makes run(**tensors), the tensors that have a row for each of the batch, and those that have not)
CASES = {
    "attention": ("attention", attention),
    "attention causal": ("attention", lambda: attention(is_causal=True, causal_alignment="bottom_right")),
    "attention_varlen": ("attention_varlen", attention_varlen),
    "attention_with_kvcache": ("attention_with_kvcache", lambda: attention_with_kvcache(0)),
    "attention_with_kvcache split": ("attention_with_kvcache", lambda: attention_with_kvcache(3)),
    "cross_entropy": ("cross_entropy", cross_entropy),
    "embedding": ("embedding", embedding),
    "gelu": ("gelu", lambda: elementwise("gelu", "input")),
    "gelu tanh": ("gelu", lambda: elementwise("gelu", "input", approximate="tanh")),
    "layer_norm": ("layer_norm", lambda: norm("layer_norm", 300, False)),
    "layer_norm residual": ("layer_norm", lambda: norm("layer_norm", 77, True)),
    "rms_norm": ("rms_norm", lambda: norm("rms_norm", 300, False)),
    "rms_norm residual": ("rms_norm", lambda: norm("rms_norm", 77, True)),
    "rotary": ("rotary", lambda: rotary(False)),
    "rotary interleaved": ("rotary", lambda: rotary(True)),
    "sample": ("sample", sample),
    "swiglu": ("swiglu", lambda: elementwise("swiglu", "gate", "up")),
}
ELSEWHERE = {
    "adamw": "tensors and no batch: test_adamw.py cuts them and changes the threads",
    "linear_cross_entropy": "its GEMMs are torch's, which depend on both: what is ours, test_linear_cross_entropy.py",
}


def test_every_operator_has_a_case():
    assert {op for op, _ in CASES.values()} | set(ELSEWHERE) == set(registry.operators())


def cast(tensors, dtype):
    return {n: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for n, t in tensors.items()}  # fmt: skip


def results(run, tensors, parameters, upstream):
    """Outputs and gradients. ``upstream`` is what flows back, for the whole batch or a row of it."""
    leaves = {n: t.detach().requires_grad_(t.requires_grad) for n, t in (tensors | parameters).items()}
    return harness.run_with_gradients(lambda _, **t: run(**t), "cpu", leaves, upstream)


def case(name, dtype):
    run, tensors, parameters = CASES[name][1]()
    if name != "sample":
        tensors = cast(tensors, dtype)
    parameters = cast(parameters, dtype)
    with torch.no_grad():
        shapes = [o.shape for o in harness.tensors_of(run(**tensors, **parameters))]
    return run, tensors, parameters, [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_threads(name, dtype, isa, restore_threads):
    arguments = case(name, dtype)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients = results(*arguments)
        found.append([*outputs, *gradients.values()])
    harness.assert_same_bits(found, "the thread count changes the result")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_batch_neighbours(name, dtype, isa):
    run, tensors, parameters, upstream = case(name, dtype)
    whole, gradients = results(run, tensors, parameters, upstream)
    row = slice(ALONE, ALONE + 1)
    # Copies: at another address too.
    one = {n: t.detach()[row].clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    alone, gradient = results(run, one, parameters, [u[row] for u in upstream])
    harness.assert_same_bits([[o[row].contiguous() for o in whole], alone], "neighbours matter to the output")
    for n in tensors.keys() & gradients.keys():
        harness.assert_same_bits(
            [[gradients[n][row].contiguous()], [gradient[n]]], f"neighbours matter to {n}'s gradient"
        )
    if name == "embedding":
        mine = tensors["input"][row].unique()
        weights = [[g["weight"][mine]] for g in (gradients, gradient)]
        harness.assert_same_bits(weights, "neighbours matter to the weight's gradient")
