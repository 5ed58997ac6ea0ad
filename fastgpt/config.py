"""GPTConfig: all that tells one decoder-only transformer from another. GPT-2, GPT-3 and Llama 3.2 are only configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NORMS = ("layer_norm", "rms_norm")
POSITIONS = ("learned", "rotary", "none")
ACTIVATIONS = ("gelu_tanh", "gelu", "swiglu")


@dataclass(frozen=True)
class RotaryScaling:
    """Llama 3.1's stretching of rotary positions to contexts longer than those of pretraining.

    The fields' names are Hugging Face's. Wavelengths above ``original_max_position_embeddings / low_freq_factor`` grow
    by ``factor``, those below ``original_max_position_embeddings / high_freq_factor`` stay, those between are blended.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            _positive_number(f"rotary_scaling.{name}", getattr(self, name))
        _positive_int("rotary_scaling.original_max_position_embeddings", self.original_max_position_embeddings)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"GPTConfig: rotary_scaling.low_freq_factor={self.low_freq_factor} must be less than "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class GPTConfig:
    """The shape and choices of a GPT. Impossible values raise ValueError or TypeError that name the field.

    Args:
        vocab_size: rows of the token embedding.
        context: the longest sequence (tokens) that the model takes.
        layers, heads, width: blocks, query heads, and channels of the residual stream.
        kv_heads: key/value heads; each serves heads / kv_heads query heads (grouped-query attention). Default: heads.
        head_dim: channels of a head. Default: width / heads.
        mlp_width: hidden channels of the MLP. Default: 4 * width; for swiglu, whose MLP has three matrices instead of
            two, 8/3 * width rounded up to a multiple of 32 (Shazeer, 2020).
        norm: "layer_norm" | "rms_norm", before attention, before the MLP and at the end.
        norm_eps: added to the variance in the norms.
        positions: "learned" (a table of context rows) | "rotary" (half-split, as in Llama) | "none".
        rotary_theta, rotary_scaling: base of the rotary frequencies, and how to stretch them ("rotary" only).
        activation: "gelu_tanh" (GPT-2's) | "gelu" (exact) | "swiglu" (gated: the first projection is twice as wide).
        bias: whether linear layers and layer norms have one (RMS norm never has).
        qkv_bias: the same for the query/key/value projection alone. Default: bias.
        tie_weights: whether the output head shares the token embedding's weight.
    """

    vocab_size: int
    context: int
    layers: int
    heads: int
    width: int
    # None only until __post_init__ has put the default in its place: a reader of a config always finds a value.
    kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    mlp_width: int = None  # type: ignore[assignment]
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    positions: str = "learned"
    rotary_theta: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    activation: str = "gelu_tanh"
    bias: bool = True
    qkv_bias: bool = None  # type: ignore[assignment]
    tie_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            _positive_int(name, getattr(self, name))
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"GPTConfig: width={self.width} does not divide into heads={self.heads}; "
                "choose heads that divide width, or give head_dim"
            )
        defaults = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_width": -(-self.width // 12) * 32 if self.activation == "swiglu" else 4 * self.width,
            "qkv_bias": self.bias,
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("kv_heads", "head_dim", "mlp_width"):
            _positive_int(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(f"GPTConfig: heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        _choice("norm", self.norm, NORMS)
        _choice("positions", self.positions, POSITIONS)
        _choice("activation", self.activation, ACTIVATIONS)
        for name in ("norm_eps", "rotary_theta"):
            _positive_number(name, getattr(self, name))
        for name in ("bias", "qkv_bias", "tie_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"GPTConfig: {name}={getattr(self, name)!r} must be True or False")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"GPTConfig: head_dim={self.head_dim} must be even for positions='rotary'")
        if self.rotary_scaling is not None:
            if not isinstance(self.rotary_scaling, RotaryScaling):
                raise TypeError(f"GPTConfig: rotary_scaling={self.rotary_scaling!r} must be a RotaryScaling or None")
            if self.positions != "rotary":
                raise ValueError(f"GPTConfig: rotary_scaling needs positions='rotary', not {self.positions!r}")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values, ready for JSON. ``from_dict`` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The config that ``to_dict`` wrote. Unknown and missing fields are errors that name them."""
        values = _checked_fields("GPTConfig", cls, values)
        if isinstance(values.get("rotary_scaling"), Mapping):
            scaling = _checked_fields("GPTConfig: rotary_scaling", RotaryScaling, values["rotary_scaling"])
            values["rotary_scaling"] = RotaryScaling(**scaling)
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A published model's config by name, with some fields changed: ``GPTConfig.preset("gpt2", context=256)``."""
        _choice("preset", name, tuple(PRESETS))
        return cls.from_dict({**PRESETS[name], **changes})


def _gpt2(layers: int, heads: int, width: int) -> dict[str, Any]:
    """Radford et al., 2019."""
    return {"vocab_size": 50257, "context": 1024, "layers": layers, "heads": heads, "width": width}


def _gpt3(layers: int, heads: int, width: int, head_dim: int) -> dict[str, Any]:
    """Brown et al., 2020, table 2.1; attention dense in every layer, where the paper alternates dense and banded."""
    # The paper's 13B has width 5140 and 40 heads of 128 channels: heads * head_dim is not its width.
    return {**_gpt2(layers, heads, width), "context": 2048, "head_dim": head_dim}


def _llama(layers: int, heads: int, kv_heads: int, head_dim: int, width: int, mlp_width: int) -> dict[str, Any]:
    """Grattafiori et al., 2024."""
    return {
        "vocab_size": 128256,
        "context": 131072,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "width": width,
        "mlp_width": mlp_width,
        "norm": "rms_norm",
        "norm_eps": 1e-5,
        "positions": "rotary",
        "rotary_theta": 500000.0,
        "rotary_scaling": {"factor": 32.0},
        "activation": "swiglu",
        "bias": False,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {  # bytes and the end of text; of the sizes and kinds tried, the one that learns most in three minutes
        "vocab_size": 257,
        "context": 256,
        "layers": 4,
        "heads": 4,
        "width": 128,
        "norm": "rms_norm",
        "positions": "rotary",
        "activation": "swiglu",
        "bias": False,
    },
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "gpt3-125m": _gpt3(12, 12, 768, 64),
    "gpt3-350m": _gpt3(24, 16, 1024, 64),
    "gpt3-760m": _gpt3(24, 16, 1536, 96),
    "gpt3-1.3b": _gpt3(24, 16, 2048, 128),  # the paper prints 24 heads of 128, which do not fill its width of 2048
    "gpt3-2.7b": _gpt3(32, 32, 2560, 80),
    "gpt3-6.7b": _gpt3(32, 32, 4096, 128),
    "gpt3-13b": _gpt3(40, 40, 5140, 128),
    "gpt3-175b": _gpt3(96, 96, 12288, 128),
    "llama-3.2-1b": _llama(16, 32, 8, 64, 2048, 8192),
    "llama-3.2-3b": _llama(28, 24, 8, 128, 3072, 8192),
}


def _positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"GPTConfig: {name}={value!r} must be an int")
    if value < 1:
        raise ValueError(f"GPTConfig: {name}={value} must be at least 1")


def _positive_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"GPTConfig: {name}={value!r} must be a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"GPTConfig: {name}={value} must be positive and finite")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"GPTConfig: {name}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")


def _checked_fields(what: str, cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``values`` whose keys are fields of the dataclass ``cls``, with all required ones present."""
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {f.name for f in fields})
    if unknown:
        raise ValueError(f"{what}: unknown {', '.join(unknown)}; allowed are {', '.join(f.name for f in fields)}")
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{what}: missing {', '.join(missing)}")
    return dict(values)
