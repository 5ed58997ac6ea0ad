"""TrainConfig: every setting of a training run, with its checks and its learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Impossible values raise ValueError or TypeError that name the field.

    Args:
        steps: optimizer steps in all.
        batch_size: sequences a step.
        micro_batch_size: at most so many sequences at once, to save memory; their gradients add up to the same step.
            Default: the whole batch.
        context: tokens a sequence. Default: the model's context.
        lr: the highest learning rate, reached after ``warmup_steps`` by a straight line.
        min_lr: the lowest, reached at the last step by half a cosine. Default: lr / 10.
        warmup_steps: default: a twentieth of the steps, at most 1,000.
        weight_decay: of matrices and embeddings (see ``parameter_groups``).
        betas, eps: of AdamW.
        max_grad_norm: gradients are scaled down to this global norm; None: never.
        dtype: "float32" | "bfloat16": of parameters and activations; AdamW's state, and for bfloat16 a master copy of
            the weights, is float32. A training loss comes in this dtype, so in bfloat16 it is shown to three digits'
            accuracy; the validation loss is the mean over single tokens, and better.
        seed: of the order of the data and of torch's generator.
        eval_every: steps between two evaluations; 0: only at the end.
        eval_tokens: at most so many validation tokens, from the start; None: all of them.
        patience: stop after so many evaluations in a row without a new lowest validation loss; None: never.
        save_every: steps between two checkpoints; 0: only at the end. A new lowest validation loss is always saved.
        keep: how many of the last checkpoints stay; the best one stays too.
        log_every: steps between two lines when the output is no terminal. metrics.jsonl has every step.
        sample_every: steps between two samples of text; 0: none.
        sample_prompt: what they begin with; empty: the start of a document.
        sample_tokens: their length.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int | None = None
    context: int | None = None
    lr: float = 1e-3
    min_lr: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    dtype: str = "float32"
    seed: int = 0
    eval_every: int = 100
    eval_tokens: int | None = 1 << 17
    patience: int | None = None
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    sample_every: int = 0
    sample_prompt: str = ""
    sample_tokens: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "keep", "log_every", "sample_tokens"):
            self._integer(name, 1)
        for name in ("seed", "eval_every", "save_every", "sample_every"):
            self._integer(name, 0)
        for name in ("micro_batch_size", "context", "eval_tokens", "patience"):
            if getattr(self, name) is not None:
                self._integer(name, 1)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(self.steps // 20, 1000))
        self._integer("warmup_steps", 0)
        if self.warmup_steps > self.steps:  # type: ignore[operator]
            raise ValueError(f"TrainConfig: warmup_steps={self.warmup_steps} must be at most steps={self.steps}")
        self._number("lr", 0, math.inf, above=True)
        if self.min_lr is None:
            object.__setattr__(self, "min_lr", self.lr / 10)
        self._number("min_lr", 0, self.lr)
        self._number("weight_decay", 0, math.inf)
        self._number("eps", 0, math.inf, above=True)
        if len(self.betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"TrainConfig: betas={self.betas!r} must be two numbers in [0, 1)")
        if self.max_grad_norm is not None:
            self._number("max_grad_norm", 0, math.inf, above=True)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"TrainConfig: dtype={self.dtype!r} is unknown; allowed are {', '.join(map(repr, DTYPES))}"
            )

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"TrainConfig: {name}={value!r} must be an int")
        if value < least:
            raise ValueError(f"TrainConfig: {name}={value} must be at least {least}")

    def _number(self, name: str, least: float, most: float, *, above: bool = False) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"TrainConfig: {name}={value!r} must be a number")
        if not (least <= value <= most and math.isfinite(value)) or (above and value == least):
            range = f"{'above' if above else 'at least'} {least}" + (f" and at most {most}" if most < math.inf else "")
            raise ValueError(f"TrainConfig: {name}={value} must be finite, {range}")

    def learning_rate(self, step: int) -> float:
        """Of step ``step`` (the first is 1): linear warm-up to lr, then half a cosine, down to min_lr at the last."""
        warmup, floor = self.warmup_steps or 0, self.min_lr or 0.0
        if step <= warmup:
            return self.lr * step / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        return floor + (self.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
