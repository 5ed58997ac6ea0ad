"""GPTConfig: presets with the published parameter counts, defaults, JSON there and back, and what it refuses."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.config import PRESETS, RotaryScaling

SMALL = {"vocab_size": 50, "context": 16, "layers": 1, "heads": 4, "width": 32}


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    assert GPT(GPTConfig.preset(preset), device="meta").num_parameters() == parameters


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("gpt3-125m", 125e6),
        ("gpt3-350m", 356e6),
        ("gpt3-760m", 760e6),
        ("gpt3-1.3b", 1.3e9),
        ("gpt3-2.7b", 2.7e9),
        ("gpt3-6.7b", 6.7e9),
        ("gpt3-13b", 13.0e9),
        ("gpt3-175b", 175.0e9),
    ],
)
def test_gpt3_family_rounds_to_the_published_numbers(preset, published):
    """Brown et al., 2020, print two to four digits."""
    count = GPT(GPTConfig.preset(preset), device="meta").num_parameters()
    assert count == pytest.approx(published, rel=0.02)


def test_gpt3_175b_exactly():
    c = GPTConfig.preset("gpt3-175b")
    block = 12 * c.width**2 + 13 * c.width  # four matrices' worth in attention, eight in the MLP; biases and norms
    assert GPT(c, device="meta").num_parameters() == (
        c.layers * block + (c.vocab_size + c.context) * c.width + 2 * c.width
    )
    assert GPT(c, device="meta").num_parameters() == 174_604_259_328


def test_defaults_follow_from_the_other_fields():
    c = GPTConfig(**SMALL)
    assert (c.kv_heads, c.head_dim, c.mlp_width, c.qkv_bias) == (4, 8, 128, True)
    assert GPTConfig(**{**SMALL, "width": 768}, activation="swiglu").mlp_width == 2048
    c = GPTConfig(**SMALL, bias=False, head_dim=6, kv_heads=2, mlp_width=48)
    assert (c.kv_heads, c.head_dim, c.mlp_width, c.qkv_bias) == (2, 6, 48, False)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_dict_and_json_there_and_back(preset):
    c = GPTConfig.preset(preset)
    assert GPTConfig.from_dict(json.loads(json.dumps(c.to_dict()))) == c


def test_preset_takes_changes():
    c = GPTConfig.preset("llama-3.2-1b", layers=2, rotary_scaling=RotaryScaling(8.0))
    assert c.layers == 2
    assert c.rotary_scaling == RotaryScaling(factor=8.0)
    assert c.width == 2048


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 5}, ValueError, r"width=32 does not divide into heads=5"),
        ({"kv_heads": 3}, ValueError, r"heads=4 is not a multiple of kv_heads=3"),
        ({"layers": 0}, ValueError, r"layers=0 must be at least 1"),
        ({"vocab_size": -1}, ValueError, r"vocab_size=-1 must be at least 1"),
        ({"context": 16.0}, TypeError, r"context=16.0 must be an int"),
        ({"width": True}, TypeError, r"width=True must be an int"),
        ({"norm": "batch"}, ValueError, r"norm='batch' is unknown; allowed are 'layer_norm', 'rms_norm'"),
        ({"positions": "alibi"}, ValueError, r"positions='alibi' is unknown; allowed are 'learned', 'rotary', 'none'"),
        (
            {"activation": "relu"},
            ValueError,
            r"activation='relu' is unknown; allowed are 'gelu_tanh', 'gelu', 'swiglu'",
        ),
        ({"norm_eps": 0.0}, ValueError, r"norm_eps=0.0 must be positive"),
        ({"rotary_theta": float("nan")}, ValueError, r"rotary_theta=nan must be positive and finite"),
        ({"bias": "yes"}, TypeError, r"bias='yes' must be True or False"),
        ({"head_dim": 5, "positions": "rotary"}, ValueError, r"head_dim=5 must be even for positions='rotary'"),
        ({"rotary_scaling": {"factor": 8.0}}, ValueError, r"rotary_scaling needs positions='rotary', not 'learned'"),
        (
            {"positions": "rotary", "rotary_scaling": {"factor": 8.0, "low_freq_factor": 4.0}},
            ValueError,
            r"low_freq_factor=4.0 must be less than high_freq_factor=4.0",
        ),
        ({"positions": "rotary", "rotary_scaling": {"factr": 8.0}}, ValueError, r"rotary_scaling: unknown factr"),
        ({"positions": "rotary", "rotary_scaling": {}}, ValueError, r"rotary_scaling: missing factor"),
        ({"positions": "rotary", "rotary_scaling": 8.0}, TypeError, r"rotary_scaling=8.0 must be a RotaryScaling"),
        ({"n_layer": 12}, ValueError, r"unknown n_layer; allowed are vocab_size, context, layers"),
    ],
)
def test_refuses_impossible_values(changes, error, message):
    with pytest.raises(error, match=message):
        GPTConfig.from_dict({**SMALL, **changes})


def test_refuses_missing_fields_and_unknown_presets():
    with pytest.raises(ValueError, match="missing layers, heads, width"):
        GPTConfig.from_dict({"vocab_size": 50, "context": 16})
    with pytest.raises(ValueError, match="preset='gpt5' is unknown; allowed are 'demo', 'gpt2'"):
        GPTConfig.preset("gpt5")


SIZES = ["vocab_size", "context", "layers", "heads", "kv_heads", "head_dim", "width", "mlp_width"]
VALUES = st.one_of(st.integers(-2, 100), st.sampled_from([None, 1.5, float("nan"), "4", True]))


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(SIZES, VALUES)))
def test_any_sizes_give_a_consistent_config_or_a_sentence(changes):
    try:
        c = GPTConfig.from_dict({**SMALL, **changes})
    except (ValueError, TypeError) as error:
        sentence = str(error)
    else:
        assert c.heads % c.kv_heads == 0
        assert min(c.vocab_size, c.context, c.layers, c.heads, c.head_dim, c.width, c.mlp_width) >= 1
        return
    assert any(f"{name}={changes[name]!r}" in sentence for name in changes), sentence
