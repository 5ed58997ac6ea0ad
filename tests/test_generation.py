"""generate: alone as in a batch, cached as uncached, where it stops, what it streams, and what it refuses."""

import dataclasses
import math

import pytest
import torch

from fastgpt import GPT, Generation, GPTConfig, generate
from fastgpt.ops.opset import OpSet
from fastgpt.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
CONFIGS = {
    "gpt2": GPTConfig(vocab_size=257, context=48, layers=2, heads=4, width=32),
    "llama": GPTConfig(
        vocab_size=257,
        context=48,
        layers=2,
        heads=4,
        kv_heads=2,
        width=32,
        norm="rms_norm",
        positions="rotary",
        activation="swiglu",
        bias=False,
    ),
}
PROMPTS = [[72, 101], [1, 2, 3, 4, 5, 6, 7, 8, 9], [200], [5, 4, 3, 2, 1]]


def make(name="gpt2", ops="fused", **changes):
    """Weights large enough that the distribution is far from flat: a wrong position or mask changes the tokens."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(CONFIGS[name], **changes), ops)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model


def tokens(results):
    return [r.tokens for r in results]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 50, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_a_prompt_is_continued_alike_alone_and_in_a_batch(name, options):
    model = make(name)
    together = generate(model, PROMPTS, 20, seed=[11] * len(PROMPTS), **options)
    for prompt, result in zip(PROMPTS, together, strict=True):
        (alone,) = generate(model, [prompt], 20, seed=11, **options)
        assert alone.tokens == result.tokens
        assert alone.log_probs == pytest.approx(result.log_probs, abs=1e-4)
        assert result.prompt == prompt
        assert result.finish_reason == "length"
        assert len(result.tokens) == len(result.log_probs) == 20


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tokens_are_those_of_uncached_logits(name):
    """Draws every token again from the logits of a plain forward pass over the whole sequence so far."""
    model = make(name)
    for row, result in enumerate(generate(model, PROMPTS, 12, seed=5, temperature=0.9)):
        sequence = list(result.prompt)
        for token, log_prob in zip(result.tokens, result.log_probs, strict=True):
            logits = model(torch.tensor([sequence]))[:, -1]
            drawn, expected = model.ops.sample(logits, temperature=0.9, seed=5, position=len(sequence), row=row)
            assert token == drawn.item()
            assert log_prob == pytest.approx(expected.item(), abs=1e-4)
            sequence.append(token)


def test_every_source_of_operators_picks_the_same_tokens():
    model = make()
    expected = tokens(generate(model.set_ops("reference"), PROMPTS, 15, seed=2))
    for ops in ("fused", "torch"):
        assert tokens(generate(model.set_ops(ops), PROMPTS, 15, seed=2)) == expected


def test_seeds():
    model = make()
    same = tokens(generate(model, PROMPTS, 10, seed=1))
    assert tokens(generate(model, PROMPTS, 10, seed=1)) == same
    assert tokens(generate(model, PROMPTS, 10, seed=2)) != same
    assert len({tuple(row) for row in tokens(generate(model, [PROMPTS[0]] * 3, 10, seed=1))}) == 3
    each = generate(model, [PROMPTS[0]] * 3, 10, seed=[1, 2, 2**64 - 1])
    assert each[0].tokens == same[0]
    assert len({tuple(r.tokens) for r in each}) == 3


def test_going_on_is_the_same_as_going_through():
    """The random number of a token depends on its position alone, so a text can be continued in two steps."""
    model = make()
    (whole,) = generate(model, [PROMPTS[1]], 20, seed=3)
    (first,) = generate(model, [PROMPTS[1]], 8, seed=3)
    (second,) = generate(model, [PROMPTS[1] + first.tokens], 12, seed=3)
    assert first.tokens + second.tokens == whole.tokens


def test_one_value_for_each_prompt():
    model = make()
    mixed = generate(model, PROMPTS, 10, temperature=[0, 1.0, 0.5, 2], top_k=[0, 3, 5, 0], seed=[1, 2, 3, 4])
    for i, (temperature, top_k) in enumerate([(0, 0), (1.0, 3), (0.5, 5), (2, 0)]):
        (alone,) = generate(model, [PROMPTS[i]], 10, temperature=temperature, top_k=top_k, seed=i + 1)
        assert mixed[i].tokens == alone.tokens


def test_penalties_and_bias_reach_the_sampler():
    model = make()
    model.ops = OpSet("fused")
    inner, seen = model.ops.sample, []
    model.ops.sample = lambda logits, **options: seen.append(options) or inner(logits, **options)
    generate(model, PROMPTS[:2], 3)
    assert seen[0]["previous_tokens"] is None
    seen.clear()
    results = generate(model, PROMPTS[:2], 3, presence_penalty=0.5, logit_bias={7: -math.inf, 8: 2.0})
    short, long = (r.prompt + r.tokens[:2] for r in results)
    padding = [-1] * (len(long) - len(short))
    assert seen[2]["previous_tokens"].tolist() == [short + padding, long]
    assert seen[0]["logit_bias"].nonzero().flatten().tolist() == [7, 8]
    (forced,) = generate(model, [[1]], 4, logit_bias={9: 1e4})
    assert forced.tokens == [9, 9, 9, 9]


# --- where it stops ---


def always(model, cycle):
    """Makes ``model.ops.sample`` give these tokens in turn, to every row alike."""
    step = iter(cycle)

    def sample(logits, **_):
        return torch.full((len(logits),), next(step)), torch.full((len(logits),), -0.5)

    model.ops.sample = sample
    return model


def test_stop_tokens_end_their_row_alone():
    model = make()
    free = generate(model, PROMPTS, 12, seed=4)
    stop = free[1].tokens[5]
    assert stop not in free[0].tokens[:5]
    for r, f in zip(generate(model, PROMPTS, 12, seed=4, stop_tokens=[stop]), free, strict=True):
        if stop in f.tokens:
            assert r.tokens == f.tokens[: f.tokens.index(stop) + 1]
            assert r.finish_reason == "stop"
        else:
            assert r.tokens == f.tokens
            assert r.finish_reason == "length"
        assert len(r.log_probs) == len(r.tokens)


def test_end_of_text_stops_by_default_where_there_is_a_tokenizer():
    text = [*b"Hi!", BYTES.eos_id, *b"never"]
    (result,) = generate(always(make(), text), ["x"], 9, tokenizer=BYTES)
    assert result == Generation([120], 0, [*b"Hi!", 256], [-0.5] * 4, "stop", "Hi!")
    (result,) = generate(always(make(), text), [[120]], 9)
    assert result.finish_reason == "length"
    assert result.text is None
    (result,) = generate(always(make(), text), ["x"], 9, tokenizer=BYTES, stop_tokens=[])
    assert result.text == "Hi!<|endoftext|>never"


@pytest.mark.parametrize(
    ("said", "stops", "text", "pieces"),
    [
        (b"one. two", [". "], "one", ["o", "n", "e", "", ""]),
        (b"one.two ", [". "], "one.two ", ["o", "n", "e", "", ".t", "w", "o", " "]),
        (b"aaab", ["aab"], "a", ["", "", "a", ""]),
        (b"abcd", ["bc", "abx"], "a", ["", "", "a"]),
        (b"abab", ["abc"], "abab", ["", "", "ab", "ab"]),  # what is held back comes with the last token
        ("naïve".encode(), ["ve"], "naï", ["n", "a", "", "ï", "", ""]),  # ï is two tokens, and comes when whole
        (b"a\xc3", ["zz"], "a\ufffd", ["a", "\ufffd"]),  # half a character at the end
    ],
)
def test_stop_strings_and_streaming(said, stops, text, pieces):
    streamed = []
    (result,) = generate(
        always(make(), said),
        ["?"],
        len(said),
        tokenizer=BYTES,
        stop_strings=stops,
        stream=lambda i, token, piece: streamed.append((i, token, piece)),
    )
    assert result.text == text
    assert [piece for _, _, piece in streamed] == pieces
    assert [token for _, token, _ in streamed] == result.tokens == list(said[: len(pieces)])
    assert result.finish_reason == ("stop" if any(s in said.decode("utf-8", "replace") for s in stops) else "length")


def test_streams_of_a_batch_are_the_results():
    streamed = dict.fromkeys(range(len(PROMPTS)), "")
    counts = dict.fromkeys(streamed, 0)

    def stream(i, token, piece):
        streamed[i] += piece
        counts[i] += 1

    results = generate(make(), PROMPTS, 25, seed=1, tokenizer=BYTES, stop_strings=["e", "zz"], stream=stream)
    assert list(streamed.values()) == [r.text for r in results]
    assert list(counts.values()) == [len(r.tokens) for r in results]


def test_the_context_ends_a_text():
    """The last token drawn needs no place: a context of 48 takes 48 tokens and tells the 49th."""
    model = make()
    for length, new, reason in ((40, 9, "length"), (40, 10, "context"), (48, 1, "length"), (48, 2, "context")):
        (result,) = generate(model, [[7] * length], new)
        assert len(result.tokens) == min(new, 49 - length)
        assert result.finish_reason == reason
    short, long = generate(model, [[7] * 10, [7] * 40], 20)
    assert (short.finish_reason, len(short.tokens)) == ("length", 20)
    assert (long.finish_reason, len(long.tokens)) == ("context", 9)
    assert tokens(generate(model, [[7] * 10], 20)) == [short.tokens]


def test_a_prompt_longer_than_the_context():
    model = make()
    prompt = list(range(60))
    with pytest.raises(ValueError, match=r"prompts\[1\] has 60 tokens, but the model's context holds 48"):
        generate(model, [[1], prompt], 4)
    with pytest.warns(UserWarning, match=r"dropped the first 16 of the 60 tokens of prompts\[1\]"):
        untouched, cut = generate(model, [[1], prompt], 4, truncate="left", seed=[0, 0])
    assert (untouched.prompt, untouched.dropped) == ([1], 0)
    assert (cut.prompt, cut.dropped, cut.finish_reason) == (prompt[16:], 16, "length")
    assert tokens(generate(model, [prompt[16:]], 4)) == [cut.tokens]
    with pytest.warns(UserWarning, match="dropped the first 36"):  # never more than half is given up
        (cut,) = generate(model, [prompt], 1000, truncate="left")
    assert (len(cut.prompt), len(cut.tokens), cut.finish_reason) == (24, 25, "context")


def test_prompts_of_every_kind():
    model = make()
    expected = tokens(generate(model, [[72, 105]], 5))
    assert tokens(generate(model, ["Hi"], 5, tokenizer=BYTES)) == expected
    assert tokens(generate(model, [(72, 105)], 5)) == expected
    assert tokens(generate(model, torch.tensor([[72, 105]]), 5)) == expected
    (begun,) = generate(model, [""], 5, tokenizer=BYTES)
    assert begun.prompt == [BYTES.eos_id]
    assert generate(model, [], 5) == []
    assert generate(model, ["Hi"], 0, tokenizer=BYTES) == [Generation([72, 105], text="")]


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model = make(vocab_size=300)
    (result,) = generate(model, ["Hi"], 40, temperature=100.0, seed=1, tokenizer=BYTES, stop_tokens=[])
    assert max(result.tokens) < BYTES.vocab_size


def test_no_gradients_and_the_model_is_left_alone():
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    generate(model, PROMPTS, 3)
    assert model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[]], {}, ValueError, r"prompts\[0\] is empty"),
        ([[1], [2, 257]], {}, ValueError, r"prompts\[1\]\[1\]=257 is outside the model's vocabulary of 257 tokens"),
        ([[-1]], {}, ValueError, r"prompts\[0\]\[0\]=-1 is outside"),
        ([[1.0]], {}, TypeError, r"prompts\[0\]\[0\]=1.0 must be an int"),
        ([1, 2], {}, TypeError, r"prompts\[0\] must be a list of token ids or a text, not int"),
        ("Hi", {"tokenizer": BYTES}, TypeError, "prompts must be a list of prompts, not str"),
        (["Hi"], {}, TypeError, r"prompts\[0\] is a text, which needs a tokenizer"),
        ([[1]], {"max_new_tokens": -1}, ValueError, "max_new_tokens=-1 must be an int, at least 0"),
        ([[1]], {"max_new_tokens": 2.5}, ValueError, "max_new_tokens=2.5 must be an int"),
        ([[1]], {"truncate": "right"}, ValueError, "truncate='right'; allowed are None and 'left'"),
        ([[1]], {"stop_strings": ["a"]}, ValueError, "stop_strings need a tokenizer"),
        ([[1]], {"stop_strings": [""], "tokenizer": BYTES}, ValueError, "none empty"),
        ([[1]], {"stop_strings": "ab", "tokenizer": BYTES}, ValueError, "must be a list of texts"),
        ([[1]], {"temperature": -1.0}, ValueError, "temperature=-1.0"),
        ([[1]], {"top_p": 1.5}, ValueError, "top_p=1.5"),
        ([[1], [2]], {"seed": [1, 2, 3]}, ValueError, "seed has 3 values for 2 prompts"),
        ([[1]], {"seed": [0.5]}, TypeError, "seed holds 0.5; it must hold ints"),
        ([[1]], {"logit_bias": {300: 1.0}}, ValueError, "logit_bias names token 300; the vocabulary has 257"),
    ],
)
def test_bad_arguments(prompts, options, error, message):
    with pytest.raises(error, match=message):
        generate(make(), prompts, **{"max_new_tokens": 2, **options})


def test_a_token_that_a_gpu_could_not_draw_is_an_error(monkeypatch):
    """The CUDA kernel cannot raise: it gives token -1, which must not become part of a text."""
    model = make()
    sample = model.ops.sample

    def third_fails(logits, **options):
        tokens, log_probs = sample(logits, **options)
        return (torch.full_like(tokens, -1), log_probs) if options["position"] == 4 else (tokens, log_probs)

    monkeypatch.setattr(model.ops, "sample", third_fails)
    with pytest.raises(ValueError, match=r"no token can be drawn for prompts\[0\] at position 4: its logits"):
        generate(model, [[1, 2]], 5)
