"""A model, a text and a trainer small enough for tests of everything around them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastgpt
from fastgpt.data import TokenFile, encode_documents, write_tokens
from fastgpt.tokenizers import ByteTokenizer

CONTEXT = 16


def model(seed: int = 0, **changes: Any) -> fastgpt.GPT:
    torch.manual_seed(seed)
    shape = {"vocab_size": 257, "context": CONTEXT, "layers": 2, "heads": 2, "width": 32} | changes
    return fastgpt.GPT(fastgpt.GPTConfig(**shape))


def tokens(folder: Path, documents: int = 40) -> tuple[TokenFile, TokenFile]:
    """Training and validation part of a text of ``documents`` lines."""
    tokenizer = ByteTokenizer()
    texts = [f"line {i}: the square of {i} is {i * i}\n" for i in range(documents)]
    path = folder / "tokens.bin"
    file = write_tokens(path, encode_documents(texts, tokenizer), tokenizer.vocab_size, tokenizer.describe())
    return file.split(0.2)


def config(**changes: Any) -> fastgpt.TrainConfig:
    return fastgpt.TrainConfig(**{"steps": 10, "batch_size": 4, "eval_every": 5, "save_every": 0, "lr": 1e-2} | changes)


def trainer(folder: Path, *, seed: int = 0, out: Path | None = None, **changes: Any) -> fastgpt.Trainer:
    """A trainer on the tiny text in ``folder``, silent; ``seed`` is the model's, ``changes`` the TrainConfig's."""
    train, validation = tokens(folder)
    return fastgpt.Trainer(
        model(seed),
        config(**changes),
        train,
        validation,
        tokenizer=ByteTokenizer(),
        out=out,
        console=Console(quiet=True),
    )


def recorder(*, terminal: bool = False) -> Console:
    """A console that keeps what is printed: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter's bytes."""
    return {name: p.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, p in model.named_parameters()}
