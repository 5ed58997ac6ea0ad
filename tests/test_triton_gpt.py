"""A whole GPT on the Triton kernels: loss, gradients, training, generation, torch.compile; all small."""

import copy
from collections import defaultdict

import pytest
import torch

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.ops import native, registry
from fastgpt.ops.accuracy import error_and_budget

if native.NO_TRITON:
    pytest.skip(native.NO_TRITON, allow_module_level=True)

CONFIGS = {
    "gpt2": GPTConfig(vocab_size=97, context=24, layers=1, heads=2, width=32),
    "llama": GPTConfig(
        vocab_size=97,
        context=24,
        layers=1,
        heads=2,
        kv_heads=1,
        width=32,
        mlp_width=48,
        norm="rms_norm",
        positions="rotary",
        activation="swiglu",
        bias=False,
        tie_weights=False,
    ),
}
# Every operator that has a Triton kernel runs on it.
ON_TRITON = {
    "default": "reference",
    **{op: "triton" for op in registry.operators() if native.missing("triton", op) is None},
}
# The parameter's value tells the runner of tests that Triton is wanted.
on_triton = pytest.mark.parametrize("backend", ["triton"])
every_config = pytest.mark.parametrize("name", CONFIGS)


def make(name, ops, dtype=torch.float32, seed=0):
    """A model in which every weight matters."""
    torch.manual_seed(seed)
    model = GPT(CONFIGS[name], ops)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4).add_(torch.randn_like(p), alpha=0.02) if p.dim() == 2 else p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype)


def batch(seed=1, rows=2, length=13):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :3] = -100
    return tokens[:, :-1], targets


def loss_and_gradients(model, tokens, targets):
    loss = model(tokens, targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@on_triton
@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_every_gradient_within_the_budget(name, dtype, backend):
    exact, plain, actual = defaultdict(list), defaultdict(list), defaultdict(list)
    for seed in range(3):
        model = make(name, "torch", dtype, seed)
        for into, variant in (
            (exact, copy.deepcopy(model).set_ops("reference").double()),
            (plain, model),
            (actual, copy.deepcopy(model).set_ops(ON_TRITON)),
        ):
            for key, value in loss_and_gradients(variant, *batch(seed)).items():
                into[key].append(value)
    for key, values in actual.items():
        error, budget = error_and_budget(*(torch.stack(v) for v in (values, plain[key], exact[key])))
        assert error <= budget, f"{key}: error {error:.3e} is over the budget {budget:.3e}"


@on_triton
@every_config
def test_trains_and_writes_like_the_reference(name, backend):
    curves, texts = {}, {}
    for ops in ("reference", backend):
        model = make(name, ON_TRITON if ops == backend else ops)
        optimizer = fastgpt.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0, backend=ops)
        curves[ops] = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(*batch())
            loss.backward()
            optimizer.step()
            curves[ops].append(loss.item())
        with fastgpt.strict():
            options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 5}
            texts[ops] = [r.tokens for r in fastgpt.generate(model, [[1, 2, 3], [4]], 4, **options)]
            texts[ops] += [r.tokens for r in fastgpt.generate(model, [[5, 6]], 3, temperature=0)]
    assert curves["reference"][-1] < curves["reference"][0]
    assert curves[backend] == pytest.approx(curves["reference"], abs=1e-4)
    assert texts[backend] == texts["reference"]


@on_triton
@every_config
def test_compiles_in_one_graph(name, backend):
    model = make(name, ON_TRITON)
    tokens, targets = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    loss = compiled(tokens, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = loss_and_gradients(model, tokens, targets)
    torch.testing.assert_close(loss.detach(), expected.pop("loss"))
    torch.testing.assert_close(list(gradients), list(expected.values()))


@on_triton
def test_one_operator_alone(backend):
    mixed, plain = make("gpt2", {"default": "reference", "layer_norm": backend}), make("gpt2", "reference")
    assert (mixed.ops.backend("layer_norm"), mixed.ops.backend("attention")) == ("triton", "reference")
    torch.testing.assert_close(mixed(batch()[0]), plain(batch()[0]))


def test_an_operator_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(registry, "_MISSING", {("gelu", "triton"): "there is no Triton kernel gelu"})
    with pytest.raises(ValueError, match="ops: gelu cannot have the backend 'triton': there is no Triton kernel gelu"):
        GPT(CONFIGS["gpt2"], "triton")


def test_tensors_on_the_cpu_are_refused(monkeypatch):
    monkeypatch.setitem(native.DEVICE_TYPES, "triton", "cuda")
    monkeypatch.setattr(registry, "_MISSING", {})
    model = GPT(CONFIGS["gpt2"], "triton")
    with pytest.raises(NotImplementedError, match="embedding: backend='triton' cannot take tensors on cpu"):
        model(batch()[0])
