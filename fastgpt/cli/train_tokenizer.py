"""``fastgpt train-tokenizer``: a byte-level BPE learnt from a corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastgpt.cli.errors import plain_errors
from fastgpt.data import python_corpus, read_documents
from fastgpt.tokenizers import BPETokenizer


def train_tokenizer(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders or quoted globs of text (.txt, .md, .jsonl, also .gz), or - for stdin; "
            "by default the English that comes with Python."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write it into (tokenizer.json).")] = Path("tokenizer"),
    vocab_size: Annotated[int, typer.Option(help="The number of ids: 256 bytes, the merges, the end of text.")] = 4096,
    text_field: Annotated[str, typer.Option(help="The field of a JSON lines record that holds the text.")] = "text",
) -> None:
    """Learn a byte-level BPE tokenizer from text.

    Example: [bold]fastgpt train-tokenizer books/ --vocab-size 8192 --out tokenizer[/bold], then
    [bold]fastgpt tokenize "Hello world" --tokenizer tokenizer[/bold]
    """
    console = Console(highlight=False, soft_wrap=True)
    with plain_errors():
        documents = read_documents(sources, text_field=text_field) if sources else python_corpus()
        tokenizer = BPETokenizer.train(documents, vocab_size, progress=console.is_terminal)
        tokenizer.save(out)
        if tokenizer.vocab_size < vocab_size:
            console.print(
                f"The text has pairs for {tokenizer.vocab_size:,} ids only, not {vocab_size:,}.", style="yellow"
            )
        console.print(f"{tokenizer.vocab_size:,} ids in {out}", markup=False)
