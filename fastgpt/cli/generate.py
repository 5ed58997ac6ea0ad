"""``fastgpt generate``: a trained model continues a text."""

from __future__ import annotations

import random
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastgpt.checkpoint import find_checkpoint, load_model
from fastgpt.cli.errors import plain_errors
from fastgpt.generation import Generation
from fastgpt.generation import generate as continue_prompts
from fastgpt.tokenizers import Tokenizer, load_tokenizer

_CHOICE, _OUTPUT = "How tokens are chosen", "Where it runs"


def generate(
    model: Annotated[Path, typer.Option(help="A run of [bold]fastgpt train[/bold], or one checkpoint of it.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What to continue; give it again for more than one text. [bold]-[/bold] reads standard input (all "
            "but a last line end). Without it the model begins a document of its own.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="The most to write.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt, with seeds S, S + 1, ...")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option(help="End as soon as this text appears; give it again for more.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Drop the beginning of a prompt that is longer than the context.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0, rich_help_panel=_CHOICE, help="0 always takes the likeliest; above 1 is wilder.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(min=0, rich_help_panel=_CHOICE, help="Only the K likeliest tokens; 0 is all.")
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(rich_help_panel=_CHOICE, help="Only the likeliest tokens that together reach P; 1 is all."),
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(rich_help_panel=_CHOICE, help="Only tokens at least P times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(rich_help_panel=_CHOICE, help="Above 1 discourages tokens that were there before.")
    ] = 1.0,
    presence_penalty: Annotated[
        float, typer.Option(rich_help_panel=_CHOICE, help="Taken once from the logit of a token that was there before.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option(rich_help_panel=_CHOICE, help="Taken for each time that a token was there before.")
    ] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_CHOICE, help="The same seed writes the same text. Default: a new one, printed."),
    ] = None,
    ops: Annotated[
        str, typer.Option(rich_help_panel=_OUTPUT, help="The operators: fused, reference or torch.")
    ] = "fused",
    device: Annotated[str, typer.Option(rich_help_panel=_OUTPUT, help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Let a trained model write on from a prompt.

    The text goes to standard output as it comes, numbers about it to standard error. Ctrl-C ends it.

    Examples:

    [bold]fastgpt generate --model runs/demo --prompt "The "[/bold]

    [bold]fastgpt generate --model runs/demo --prompt - --temperature 0 < beginning.txt[/bold]
    """
    with plain_errors():
        checkpoint = find_checkpoint(model)
        gpt = load_model(checkpoint, ops, device=_device(device))
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer.vocab_size > gpt.config.vocab_size:
            raise ValueError(
                f"{checkpoint}: the tokenizer has {tokenizer.vocab_size} ids, the model only {gpt.config.vocab_size}"
            )
        if seed is None:
            seed = random.SystemRandom().randrange(1 << 32)
        texts = [text for text in _read(prompt or [""]) for _ in range(samples)]
        printer = _Printer(texts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is dropped is said below, in the command's own words
                results = continue_prompts(
                    gpt,
                    [tokenizer.encode(text) for text in texts],
                    max_new_tokens,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                    repetition_penalty=repetition_penalty,
                    presence_penalty=presence_penalty,
                    frequency_penalty=frequency_penalty,
                    seed=[seed + i % samples for i in range(len(texts))],
                    tokenizer=tokenizer,
                    stop_strings=stop or (),
                    truncate="left" if truncate else None,
                    stream=printer.token,
                )
        except KeyboardInterrupt:
            printer.finish()
            printer.report(seed, "interrupted")
            raise typer.Exit(130) from None
        printer.finish()
        printer.report(seed, _endings(results, gpt.config.context, tokenizer))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for unknown and for absent devices
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _read(prompts: list[str]) -> list[bytes]:
    if prompts.count("-") > 1:
        raise ValueError("--prompt - reads standard input, which can be read only once")
    texts = []
    for prompt in prompts:
        if prompt == "-":
            text = sys.stdin.buffer.read()
            texts.append(text[:-1] if text.endswith(b"\n") else text)
        else:
            texts.append(prompt.encode("utf-8", "surrogateescape"))
    return texts


def _endings(results: list[Generation], context: int, tokenizer: Tokenizer) -> str:
    """What a reader should know about how the texts began and ended."""
    notes = [f"dropped the first {r.dropped} tokens of the prompt" for r in results if r.dropped]
    if any(r.finish_reason == "context" for r in results):
        notes.append(f"stopped where the context of {context} tokens is full")
    if any(r.finish_reason == "stop" and r.tokens[-1] == tokenizer.eos_id for r in results):
        notes.append("the model ended the text")
    return "; ".join(notes)


class _Printer:
    """Prints the first text as it comes, the others after it, and counts."""

    def __init__(self, prompts: list[bytes]) -> None:
        self._prompts = prompts
        self._pieces: list[list[str]] = [[] for _ in prompts]
        self._terminal = sys.stdout.isatty()
        self._tokens = 0
        self._start = time.perf_counter()
        self._first = 0.0

    def token(self, row: int, token: int, text: str) -> None:
        self._tokens += 1
        if not self._first:
            self._first = time.perf_counter()
            self._begin(0)
        if row == 0:
            self._write(text)
        else:
            self._pieces[row].append(text)

    def finish(self) -> None:
        if not self._first:
            self._begin(0)
        for row in range(1, len(self._prompts)):
            typer.echo("\n")
            self._begin(row)
            self._write("".join(self._pieces[row]))
        typer.echo()

    def report(self, seed: int, note: str) -> None:
        end = time.perf_counter()
        numbers = f"{self._tokens} tokens"
        if self._first:
            numbers += f" in {end - self._start:.2f} s"
            # The first token of each row comes out of the pass over the prompts.
            decoded = self._tokens - len(self._prompts)
            if decoded > 0 and end > self._first:
                numbers += f" ({decoded / (end - self._first):.1f} tokens/s after the first)"
        typer.secho(f"{numbers}; seed {seed}{'; ' + note if note else ''}", dim=True, err=True)

    def _begin(self, row: int) -> None:
        if len(self._prompts) > 1:
            typer.secho(f"--- {row + 1} of {len(self._prompts)}", dim=True, err=True)
        typer.secho(self._visible(self._prompts[row].decode("utf-8", "replace")), bold=True, nl=False)

    def _write(self, text: str) -> None:
        typer.echo(self._visible(text), nl=False)
        sys.stdout.flush()

    def _visible(self, text: str) -> str:
        """A terminal obeys control characters, and a model may write any: there they show as U+FFFD."""
        if not self._terminal:
            return text
        return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
