"""The whole model: its operators agree, it is the published models, caching changes nothing, bad input is named."""

import copy
import dataclasses
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import GPT, GPTConfig, KVCache
from fastgpt.config import RotaryScaling
from fastgpt.ops.accuracy import error_and_budget
from fastgpt.ops.opset import OpSet

CONFIGS = {
    "gpt2": GPTConfig(vocab_size=97, context=24, layers=3, heads=4, width=48),
    "llama": GPTConfig(
        vocab_size=101,
        context=24,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=10,
        width=48,
        mlp_width=80,
        norm="rms_norm",
        positions="rotary",
        rotary_scaling=RotaryScaling(4.0, original_max_position_embeddings=12),
        activation="swiglu",
        bias=False,
        tie_weights=False,
    ),
    "mixed": GPTConfig(
        vocab_size=61,
        context=24,
        layers=2,
        heads=3,
        kv_heads=1,
        width=33,
        mlp_width=50,
        positions="none",
        activation="gelu",
        bias=False,
        qkv_bias=True,
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config, ops="fused", dtype=torch.float32, seed=0):
    """A model in which every weight matters: no zero biases, no unit norms, logits of order one."""
    torch.manual_seed(seed)
    model = GPT(config, ops)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4).add_(torch.randn_like(p), alpha=0.02) if p.dim() == 2 else p.add_(torch.randn_like(p), alpha=0.2)
    return model.to(dtype)


def batch(config, rows=3, length=17, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return tokens[:, :-1], targets


def with_ops(model, ops):
    return copy.deepcopy(model).set_ops(ops)


def loss_and_gradients(model, tokens, targets):
    loss = model(tokens, targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ops", ["reference", "fused"])
def test_loss_and_every_gradient_within_the_budget(config, dtype, ops):
    """Eight models and batches are one sample: among the 48 numbers of one norm's gradient, the largest error of one
    run and of another differ by a factor of two by luck alone."""
    exact, plain, actual = defaultdict(list), defaultdict(list), defaultdict(list)
    for seed in range(8):
        model = make(config, dtype=dtype, seed=seed)
        tokens, targets = batch(config, seed=seed)
        for into, variant in (
            (exact, with_ops(model, "reference").double()),
            (plain, with_ops(model, "torch")),
            (actual, with_ops(model, ops)),
        ):
            for name, value in loss_and_gradients(variant, tokens, targets).items():
                into[name].append(value)
    for name, values in actual.items():
        assert {v.dtype for v in values} == {dtype}
        error, budget = error_and_budget(*(torch.stack(v) for v in (values, plain[name], exact[name])))
        assert error <= budget, f"{name}: error {error:.3e} is over the budget {budget:.3e}"


@every_config
def test_float64_truth_is_torchs_own(config):
    """The reference formulas and torch.nn.functional are independent of each other; in float64 they must meet."""
    model = make(config, dtype=torch.float64)
    tokens, targets = batch(config)
    torch.testing.assert_close(
        loss_and_gradients(with_ops(model, "reference"), tokens, targets),
        loss_and_gradients(with_ops(model, "torch"), tokens, targets),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_training_curves_stay_together(name):
    """Model, loss, clipping and optimizer: ours fused, ours by the formulas, and torch alone."""
    config = CONFIGS[name]
    tokens, targets = batch(config, rows=4, length=24)
    curves = {}
    for ops in ("reference", "fused", "torch"):
        torch.manual_seed(0)
        model = GPT(config, ops)
        optimizer = (
            torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
            if ops == "torch"
            else fastgpt.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, max_grad_norm=1.0, backend=ops)
        )
        curves[ops] = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(tokens, targets)
            loss.backward()
            if ops == "torch":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curves[ops].append(loss.item())
    assert curves["reference"][-1] < 0.6 * curves["reference"][0]  # it learns
    for ops in ("fused", "torch"):
        assert max(abs(a - b) for a, b in zip(curves[ops], curves["reference"], strict=True)) < 1e-4


def test_gradients_of_micro_batches_add_up():
    """With reduction="sum", micro-batches of any sizes and numbers of ignored targets make the batch's mean."""
    config = CONFIGS["gpt2"]
    model = make(config, dtype=torch.float64)
    tokens, targets = batch(config, rows=4)
    count = int((targets != -100).sum())
    whole = loss_and_gradients(model, tokens, targets)
    for part in (slice(0, 1), slice(1, 4)):
        (model(tokens[part], targets[part], reduction="sum") / count).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ops", ["reference", "fused", {"linear_cross_entropy": "torch"}], ids=str)
def test_gradients_of_a_tied_embedding_meet_as_two_matrices_would(ops, dtype, monkeypatch):
    """The tokens' part is added to the head's, row by row: the same bits as with zeros in all other rows."""
    model = make(CONFIGS["gpt2"], ops, dtype)
    tokens, targets = batch(model.config)
    sparse = loss_and_gradients(model, tokens, targets)
    loss = model(tokens, targets)
    twice = [torch.autograd.grad(loss, model.token_embedding, retain_graph=again) for again in (True, False)]
    model(tokens, targets).backward()
    model(tokens, targets).backward()
    added = model.token_embedding.grad
    monkeypatch.setattr(GPT, "_weights_of_a_loss", lambda self: (self.token_embedding, self.output_weight))
    dense = loss_and_gradients(model, tokens, targets)
    assert all(torch.equal(sparse[name], dense[name]) for name in dense)
    for (gradient,) in twice:
        torch.testing.assert_close(gradient, dense["token_embedding"])
    assert torch.equal(added, 2 * dense["token_embedding"])


def test_loss_is_the_cross_entropy_of_the_logits():
    config = CONFIGS["llama"]
    model = make(config, dtype=torch.float64)
    tokens, targets = batch(config)
    logits = model(tokens)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"ignore_index": 7}):
        expected = F.cross_entropy(logits.mT, targets.clamp(min=0) if "ignore_index" in options else targets, **options)
        actual = model(tokens, targets.clamp(min=0) if "ignore_index" in options else targets, **options)
        torch.testing.assert_close(actual, expected)
    z = 0.01 * torch.logsumexp(logits, -1)[targets != -100].square().mean()
    torch.testing.assert_close(model(tokens, targets, z_loss=0.01), F.cross_entropy(logits.mT, targets) + z)


# --- the published models ---


def test_gpt2_is_transformers_gpt2():
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    config = GPTConfig(vocab_size=97, context=24, layers=3, heads=4, width=48)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_positions=24, n_layer=3, n_head=4, n_embd=48)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    source = theirs.state_dict()
    renamed = {
        "token_embedding": source["transformer.wte.weight"],
        "position_embedding": source["transformer.wpe.weight"],
        "norm.weight": source["transformer.ln_f.weight"],
        "norm.bias": source["transformer.ln_f.bias"],
    }
    layer = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for i in range(config.layers):
        for ours, their in layer.items():
            for kind in ("weight", "bias"):
                value = source[f"transformer.h.{i}.{their}.{kind}"]
                renamed[f"blocks.{i}.{ours}.{kind}"] = value.T if value.dim() == 2 else value  # Conv1D is transposed
    _assert_same_logits(GPT(config), renamed, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_transformers_llama(tied):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    config = GPTConfig.preset(
        "llama-3.2-1b",
        vocab_size=101,
        context=64,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=8,
        width=48,
        mlp_width=80,
        rotary_scaling=RotaryScaling(8.0, original_max_position_embeddings=16),
        tie_weights=tied,
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101,
            max_position_embeddings=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size=48,
            intermediate_size=80,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    source = theirs.state_dict()
    renamed = {"token_embedding": source["model.embed_tokens.weight"], "norm.weight": source["model.norm.weight"]}
    if not tied:
        renamed["head"] = source["lm_head.weight"]
    layer = {
        "attention_norm": ["input_layernorm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.output": ["self_attn.o_proj"],
        "mlp_norm": ["post_attention_layernorm"],
        "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down": ["mlp.down_proj"],
    }
    for i in range(config.layers):
        for ours, their in layer.items():
            renamed[f"blocks.{i}.{ours}.weight"] = torch.cat([source[f"model.layers.{i}.{t}.weight"] for t in their])
    _assert_same_logits(GPT(config), renamed, theirs)


def _assert_same_logits(ours, weights, theirs):
    ours.load_state_dict(weights)
    tokens, _ = batch(ours.config, length=ours.config.context)
    with torch.no_grad():
        expected = theirs(tokens).logits
        for ops in ("fused", "reference", "torch"):
            torch.testing.assert_close(ours.set_ops(ops)(tokens), expected, rtol=1e-4, atol=1e-4)


# --- the cache ---


@every_config
@pytest.mark.parametrize("ops", ["fused", "reference", "torch"])
@torch.no_grad()
def test_cached_logits_are_the_uncached(config, ops):
    model = make(config, ops)
    tokens, _ = batch(config, rows=3, length=20)
    expected = model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-4}
    cache = KVCache(model, 3)
    for start, end in ((0, 1), (1, 7), (7, 8), (8, 20)):
        torch.testing.assert_close(model(tokens[:, start:end], cache=cache), expected[:, start:end], **close)
    assert cache.lengths == [20, 20, 20]


@every_config
@pytest.mark.parametrize("ops", ["fused", "reference", "torch"])
@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(config, ops):
    model = make(config, ops)
    tokens, _ = batch(config, rows=3, length=20)
    expected = model(tokens)
    close = {"rtol": 1e-4, "atol": 1e-4}

    def take(rows, starts, n):
        return torch.stack([tokens[r, s : s + n] for r, s in zip(rows, starts, strict=True)])

    def at(rows, starts, n):
        return torch.stack([expected[r, s : s + n] for r, s in zip(rows, starts, strict=True)])

    cache = KVCache(model, 3)
    lengths = [5, 9, 7]
    last = model(tokens[:, :9], cache=cache, lengths=lengths, last_only=True)
    torch.testing.assert_close(last, at(range(3), [4, 8, 6], 1)[:, 0], **close)
    assert cache.lengths == lengths
    torch.testing.assert_close(model(take(range(3), lengths, 3), cache=cache), at(range(3), lengths, 3), **close)
    cache.select([2, 0])
    assert cache.lengths == [10, 8]
    last = model(take([2, 0], [10, 8], 1), cache=cache, last_only=True)
    torch.testing.assert_close(last, at([2, 0], [10, 8], 1)[:, 0], **close)
    cache.select([1])
    torch.testing.assert_close(model(tokens[:1, 9:20], cache=cache), expected[:1, 9:20], **close)


def test_cache_is_not_advanced_by_a_pass_that_fails():
    model = make(CONFIGS["gpt2"])
    cache = KVCache(model, 1, max_length=4)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), cache=cache)
        with pytest.raises(IndexError):
            model(torch.tensor([[97]]), cache=cache)
        assert cache.lengths == [2]
        with pytest.raises(ValueError, match=r"2 cached and 3 new tokens exceed the cache's max_length=4"):
            model(torch.tensor([[1, 2, 3]]), cache=cache)


# --- operators, views, compilation, weights ---


def test_one_argument_swaps_the_operators():
    model = make(CONFIGS["gpt2"])
    tokens, targets = batch(model.config)
    calls = []
    for name in ("embedding", "layer_norm", "attention", "gelu", "linear_cross_entropy"):
        original = getattr(model.ops, name)
        setattr(model.ops, name, lambda *a, _n=name, _f=original, **k: calls.append(_n) or _f(*a, **k))
    model(tokens, targets)
    layers = model.config.layers
    assert {name: calls.count(name) for name in calls} == {
        "embedding": 1,
        "layer_norm": 2 * layers + 1,
        "attention": layers,
        "gelu": layers,
        "linear_cross_entropy": 1,
    }
    calls.clear()
    assert model.set_ops({"gelu": "torch"}) is model
    model(tokens, targets)
    assert not calls
    assert model.ops.spec == {"gelu": "torch"}
    assert OpSet(model.ops).spec == {"gelu": "torch"}


@pytest.mark.parametrize(
    ("ops", "error", "message"),
    [
        ("fast", ValueError, "has no backend 'fast'; allowed are 'fused', 'reference'"),
        ({"gelu": "cuda9"}, ValueError, "gelu has no backend 'cuda9'"),
        ({"softmax": "torch"}, ValueError, "unknown operator 'softmax'; there are adamw, attention"),
        ({"default": "quick"}, ValueError, "has no backend 'quick'"),
        (None, TypeError, "ops=None must be a backend's name or a mapping"),
    ],
)
def test_unknown_operators_and_backends(ops, error, message):
    with pytest.raises(error, match=message):
        GPT(CONFIGS["gpt2"], ops)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fused_means_fused(config, dtype):
    """Training and cached decoding never leave the kernels."""
    model = make(config, dtype=dtype)
    with fastgpt.strict():
        model(*batch(config)).backward()
        for prompts in ([[1, 2]], [[1, 2, 3], [4]]):
            fastgpt.generate(model, prompts, 3, top_k=5, repetition_penalty=1.1)


@pytest.mark.parametrize("ops", ["fused", "reference", "torch"])
def test_attention_reads_and_writes_views(ops):
    """No copy before attention (all three are views of one projection), none after it (merging heads is a view)."""
    model = make(CONFIGS["gpt2"], ops)
    inner, seen = model.ops.attention, []

    def spy(q, k, v, **options):
        y = inner(q, k, v, **options)
        seen.append((q, k, v, y))
        return y

    model.ops.attention = spy
    model(batch(model.config)[0])
    assert len(seen) == 3
    for q, k, v, y in seen:
        assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(name, backend):
    model = make(dataclasses.replace(CONFIGS[name], layers=1))  # it has every operator; tracing takes its time
    tokens, targets = batch(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(tokens), model(tokens))
    loss = compiled(tokens, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = loss_and_gradients(model, tokens, targets)
    torch.testing.assert_close(loss.detach(), expected.pop("loss"))
    torch.testing.assert_close(list(gradients), list(expected.values()))


@every_config
def test_moving_and_loading_keeps_the_model_whole(config):
    model = make(config)
    tokens, _ = batch(config)
    expected = model(tokens)
    assigned = GPT(config, device="meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(assigned(tokens), expected, rtol=0, atol=0)
    emptied = GPT(config, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(model.state_dict())
    torch.testing.assert_close(emptied(tokens), expected, rtol=0, atol=0)
    there_and_back = copy.deepcopy(model).to(torch.float64).to(torch.float32)
    torch.testing.assert_close(there_and_back(tokens), expected, rtol=0, atol=0)
    if config.positions == "rotary":
        assert {t.dtype for t in model.to(torch.bfloat16).rotary} == {torch.float32}
        assert {t.dtype for t in model.to(torch.float64).rotary} == {torch.float64}
    assert not any("rotary" in name for name in model.state_dict())


def test_initialisation_is_gpt2s():
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=500, context=64, layers=8, heads=4, width=128, tie_weights=False))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert bool((p == (0 if name.endswith("bias") else 1)).all()), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("output.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    torch.manual_seed(3)
    again = GPT(model.config)
    assert torch.equal(model.token_embedding, again.token_embedding)


def test_counts():
    gpt2 = GPT(GPTConfig.preset("gpt2"), device="meta")
    assert gpt2.num_parameters(embeddings=False) == 124_439_808 - (50257 + 1024) * 768
    # Each of 2 products with a weight; scores and weighted sum over 512.5 keys on average.
    forward = 2 * (124_439_808 - 1024 * 768 - 12 * (9 + 4) * 768 - 2 * 768) + 12 * 4 * 768 * 512.5
    assert gpt2.estimate_flops(1000, backward=False) == 1000 * forward
    assert gpt2.estimate_flops(1000) == 3000 * forward
    assert gpt2.estimate_flops(1, length=1, backward=False) == forward - 12 * 4 * 768 * 511.5


# --- bad input ---


@pytest.mark.parametrize("ops", ["fused", "reference", "torch"])
@pytest.mark.parametrize("bad", [-1, 97, 10**12])
def test_token_outside_the_vocabulary(ops, bad):
    with pytest.raises((IndexError, ValueError)):
        make(CONFIGS["gpt2"], ops)(torch.tensor([[1, bad, 2]]))


def test_token_and_target_outside_the_vocabulary_are_named():
    model = make(CONFIGS["gpt2"])
    with pytest.raises((IndexError, ValueError), match="97"):
        model(torch.tensor([[1, 97, 2]]))
    with pytest.raises((IndexError, ValueError), match="98"):
        model(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 98, 3]]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m([[1, 2]]), TypeError, "tokens must be a Tensor, not list"),
        (lambda m: m(torch.zeros(1, 2)), TypeError, "tokens have dtype torch.float32; allowed are int64, int32"),
        (lambda m: m(torch.zeros(2, dtype=torch.long)), ValueError, r"tokens have shape \(2,\); it must be \(batch"),
        (lambda m: m(torch.zeros(2, 0, dtype=torch.long)), ValueError, r"tokens have shape \(2, 0\)"),
        (
            lambda m: m(torch.zeros(1, 25, dtype=torch.long)),
            ValueError,
            "a sequence of 25 tokens is longer than the model's context of 24",
        ),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)),
            ValueError,
            r"targets have shape \(1, 2\), tokens \(1, 3\)",
        ),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), last_only=True),
            ValueError,
            "targets go with none of cache, lengths, last_only",
        ),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), reduction="max"),
            ValueError,
            "reduction",
        ),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.long), lengths=[2]), ValueError, "lengths go with a cache"),
        (
            lambda m: m(torch.zeros(1, 3, dtype=torch.long), cache=KVCache(m, 1)),
            RuntimeError,
            "no gradient flows through a cache",
        ),
        (
            lambda m: torch.no_grad()(m)(torch.zeros(2, 3, dtype=torch.long), cache=KVCache(m, 1)),
            ValueError,
            "tokens have 2 rows, the cache 1",
        ),
        (
            lambda m: torch.no_grad()(m)(torch.zeros(2, 3, dtype=torch.long), cache=KVCache(m, 2), lengths=[3, 0]),
            ValueError,
            r"lengths=\[3, 0\] must be 2 numbers from 1 to 3",
        ),
        (lambda m: KVCache(m, 0), ValueError, "batch=0 must be at least 1"),
        (lambda m: KVCache(m, 1, 25), ValueError, "max_length=25 from 1 to 24, the context"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(make(CONFIGS["gpt2"]))


def test_one_token_and_no_rows():
    model = make(CONFIGS["gpt2"])
    assert model(torch.tensor([[5]], dtype=torch.int32)).shape == (1, 1, 97)
    assert model(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 4, 97)
