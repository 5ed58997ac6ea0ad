"""``fastgpt predict``: the least time that each kernel's work can take on some GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastgpt.cli.errors import plain_errors
from fastgpt.cli.explain import BUDGETS, Kind
from fastgpt.files import atomic_write
from fastgpt.gpu import budget, predictions


def predict(
    output: Annotated[Path | None, typer.Option(help="Write them to this file instead of printing them.")] = None,
) -> None:
    """Print predicted floor times on A100, H100 and RTX 4090, at GPT-2's and Llama's shapes. Nothing is measured."""
    with plain_errors():
        limits = budget.load(BUDGETS[Kind.cuda]) if BUDGETS[Kind.cuda].exists() else budget.Budget((), {})
        text = predictions.document(limits)
        if output is None:
            print(text, end="")
        else:
            with atomic_write(output) as file:
                file.write(text)
            print(f"wrote {output}")
