"""``fastgpt tokenize``: a text as its tokens."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fastgpt.cli.errors import plain_errors
from fastgpt.tokenizers import Tokenizer, make_tokenizer

_COLOURS = ("#ffd8a8", "#b2f2bb", "#a5d8ff", "#eebefa", "#ffec99")  # neighbours differ; all are light
_SPECIAL = "bold white on #c92a2a"


def tokenize(
    text: Annotated[str | None, typer.Argument(help="What to tokenize; by default all of stdin.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="[bold]bytes[/bold], [bold]gpt2[/bold] (needs its ranks file), a folder with a tokenizer in it "
            "(such as a checkpoint, or what [bold]fastgpt train-tokenizer[/bold] wrote), or a tokenizer.json."
        ),
    ] = "bytes",
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids alone, separated by spaces.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Let special tokens such as <|endoftext|> be typed in the text.")
    ] = False,
) -> None:
    """Show a text as coloured tokens with their ids.

    A space shows as ·, a line end as \\n, and bytes that are no character on their own as \\xNN.

    Examples: [bold]fastgpt tokenize "Hello world"[/bold], [bold]fastgpt tokenize --ids < book.txt[/bold]
    """
    with plain_errors():
        if text is None and sys.stdin.isatty():
            raise ValueError('no text: give it as an argument (fastgpt tokenize "Hello world") or on stdin')
        data = sys.stdin.buffer.read() if text is None else text.encode("utf-8", "surrogateescape")
        chosen = make_tokenizer(tokenizer)
        encoded = chosen.encode(data, allowed_special=special)
        if ids:
            typer.echo(" ".join(map(str, encoded)))
        else:
            _show(chosen, encoded, len(data))


def _show(tokenizer: Tokenizer, ids: list[int], size: int) -> None:
    """Rows of pieces as wide as the terminal, their ids beneath, and what it comes to."""
    console = Console(highlight=False)
    pieces, numbers = Text(), Text()
    for position, id in enumerate(ids):
        piece, number = readable(tokenizer.token_bytes(id)), str(id)
        width = max(cell_len(piece), len(number))
        if pieces and pieces.cell_len + width > console.width:
            _print_row(console, pieces, numbers)
            pieces, numbers = Text(), Text()
        is_special = id in tokenizer.special_tokens.values()
        pieces.append(piece, _SPECIAL if is_special else f"black on {_COLOURS[position % len(_COLOURS)]}")
        pieces.append(" " * (width - cell_len(piece) + 1))
        numbers.append(number.ljust(width + 1), "dim")
    if pieces:
        _print_row(console, pieces, numbers)
    ratio = f", {size / len(ids):.2f} bytes per token" if ids else ""
    console.print(
        f"{len(ids):,} tokens, {size:,} bytes{ratio} ({tokenizer.kind}, {tokenizer.vocab_size:,} ids)", style="dim"
    )


def _print_row(console: Console, pieces: Text, numbers: Text) -> None:
    for line in (pieces, numbers):
        line.rstrip()
        console.print(line, soft_wrap=True)


def readable(piece: bytes) -> str:
    """The bytes of a token as visible text: spaces as ·, all that does not print escaped as in Python."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return "".join(
        "·" if character == " " else character if character.isprintable() else ascii(character)[1:-1]
        for character in text
    )
