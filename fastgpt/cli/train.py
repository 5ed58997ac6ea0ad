"""``fastgpt train``: text in, a trained GPT out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

import fastgpt
from fastgpt.checkpoint import find_checkpoint, list_checkpoints
from fastgpt.cli.errors import plain_errors
from fastgpt.config import PRESETS, GPTConfig
from fastgpt.data import TokenFile, encode_documents, python_corpus, read_documents, write_tokens
from fastgpt.files import read_json, write_json
from fastgpt.model import GPT
from fastgpt.tokenizers import BPETokenizer, Tokenizer, load_tokenizer, make_tokenizer
from fastgpt.train_config import TrainConfig
from fastgpt.training import CURVE, METRICS, Trainer, TrainResult

RUN = "run.json"  # the options of a run, for --resume
TOKENS = "tokens.bin"
_MANY_DOCUMENTS = 100  # from here on, whole documents are set aside for validation; below, the end of the text

_DATA, _MODEL, _TRAINING, _WATCHING = "Text", "Model", "Training", "Watching and keeping"


def _option(panel: str, help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def train(
    context_: typer.Context,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders or quoted globs of text (.txt, .md, .jsonl, also .gz), or - for stdin, or one file of "
            "tokens that an earlier run made. By default the English that comes with Python."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the run: checkpoints, metrics, loss curve.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in --out, with its own options but for those given now."),
    ] = False,
    tokenizer: Annotated[
        str,
        _option(
            _DATA,
            "[bold]bytes[/bold]; [bold]bpe:N[/bold] learns a byte-level BPE of N ids from the text; [bold]gpt2[/bold]; "
            "or the path of a tokenizer.",
        ),
    ] = "bytes",
    validation_fraction: Annotated[float, _option(_DATA, "How much of the text is set aside to measure on.")] = 0.1,
    text_field: Annotated[str, _option(_DATA, "The field of a JSON lines record that holds the text.")] = "text",
    separator: Annotated[str | None, _option(_DATA, "What stands between the documents of a text file.")] = None,
    preset: Annotated[
        str, _option(_MODEL, f"The shape to start from: {', '.join(PRESETS)}. The options below change it.")
    ] = "demo",
    layers: Annotated[int | None, _option(_MODEL, "Transformer blocks.", show_default="the preset's")] = None,
    heads: Annotated[int | None, _option(_MODEL, "Attention heads.", show_default="the preset's")] = None,
    width: Annotated[
        int | None, _option(_MODEL, "Channels; heads must divide it.", show_default="the preset's")
    ] = None,
    context: Annotated[
        int | None, _option(_MODEL, "The longest text, in tokens, that it sees at once.", show_default="the preset's")
    ] = None,
    ops: Annotated[
        str,
        _option(
            _MODEL,
            "Who computes: [bold]fused[/bold] kernels, the readable [bold]reference[/bold], or [bold]torch[/bold]; or "
            "op by op, as in [bold]attention=torch,gelu=reference[/bold].",
        ),
    ] = "fused",
    steps: Annotated[int, _option(_TRAINING, "Optimizer steps.")] = 1000,
    batch_size: Annotated[int, _option(_TRAINING, "Sequences a step.")] = 16,
    micro_batch_size: Annotated[
        int | None, _option(_TRAINING, "Sequences at once, to save memory.", show_default="all of a step")
    ] = None,
    lr: Annotated[float, _option(_TRAINING, "The highest learning rate.")] = 1e-3,
    min_lr: Annotated[float | None, _option(_TRAINING, "The last learning rate.", show_default="lr / 10")] = None,
    warmup_steps: Annotated[
        int | None, _option(_TRAINING, "Steps until the highest learning rate.", show_default="steps / 20")
    ] = None,
    weight_decay: Annotated[float, _option(_TRAINING, "AdamW's, for matrices and embeddings.")] = 0.1,
    max_grad_norm: Annotated[float, _option(_TRAINING, "Clip gradients to this norm; 0: never.")] = 1.0,
    dtype: Annotated[str, _option(_TRAINING, "float32 or bfloat16 (with float32 master weights).")] = "float32",
    seed: Annotated[int, _option(_TRAINING, "Of the weights and the order of the text.")] = 0,
    threads: Annotated[int | None, _option(_TRAINING, "CPU threads.", show_default="all cores")] = None,
    eval_every: Annotated[int, _option(_WATCHING, "Steps between two measurements of the validation loss.")] = 100,
    eval_tokens: Annotated[int, _option(_WATCHING, "At most so many validation tokens each time; 0: all.")] = 1 << 17,
    patience: Annotated[
        int | None, _option(_WATCHING, "Stop after so many measurements without a better one.", show_default="never")
    ] = None,
    save_every: Annotated[int, _option(_WATCHING, "Steps between two checkpoints; the best is always saved.")] = 500,
    keep: Annotated[int, _option(_WATCHING, "How many of the last checkpoints to keep beside the best.")] = 2,
    log_every: Annotated[int, _option(_WATCHING, "Steps between two lines where there is no terminal.")] = 10,
    sample_every: Annotated[int, _option(_WATCHING, "Steps between two samples of text; 0: none.")] = 0,
    prompt: Annotated[str, _option(_WATCHING, "What the samples begin with.")] = "",
    tensorboard: Annotated[
        bool, _option(_WATCHING, "Write for TensorBoard too, into OUT/tensorboard.", "--tensorboard")
    ] = False,
) -> None:
    """Train a GPT on text, from nothing.

    Example: [bold]fastgpt train books/ --out runs/books --tokenizer bpe:4096 --steps 2000[/bold], then
    [bold]fastgpt generate --model runs/books --prompt "Once"[/bold]

    Ctrl-C saves a checkpoint; the same command with [bold]--resume[/bold] then goes on as if nothing had happened.
    """
    options = {name: value for name, value in context_.params.items() if name not in ("out", "resume")}
    console = Console(highlight=False, soft_wrap=True)
    with plain_errors():
        if resume:
            options = _resumed_options(out, options, given=_given(context_))
        elif list_checkpoints(out):
            raise ValueError(f"{out} already holds a run: go on with it (--resume), or choose another --out")
        if options["threads"] is not None:
            if options["threads"] < 1:
                raise ValueError(f"--threads {options['threads']} must be at least 1")
            torch.set_num_threads(options["threads"])
        result = run(out, options, console, resume=resume)
    if result.stopped == "interrupted":
        raise typer.Exit(130)  # as a shell reports Ctrl-C


def run(out: Path, options: dict[str, Any], console: Console, *, resume: bool = False) -> TrainResult:
    """Trains as ``options`` (of the command, by name) say, into the folder ``out``."""
    config = train_config(options)
    ops = parse_ops(options["ops"])
    if resume:
        chosen = load_tokenizer(find_checkpoint(out))
        tokens = TokenFile(options["tokens"])
    else:
        shape = model_config(options, vocab_size=1)  # refuse what is impossible before reading a large corpus
        if not 0 < options["validation_fraction"] < 1:
            raise ValueError(f"--validation-fraction {options['validation_fraction']} must be above 0 and below 1")
        tokens, chosen = prepare_tokens(out, options, console)
        options = {**options, "tokens": str(tokens.path)}
    shape = model_config(options, vocab_size=chosen.vocab_size)
    train_part, validation_part = split_tokens(tokens, options["validation_fraction"])
    torch.manual_seed(config.seed)
    model = GPT(shape, ops=ops)
    trainer = Trainer(
        model,
        config,
        train_part,
        validation_part,
        tokenizer=chosen,
        out=out,
        tensorboard=options["tensorboard"],
        console=console,
    )
    if resume:
        changes = trainer.resume()
        console.print(f"Going on from step {trainer.step:,} of {config.steps:,}" + "".join(f"\n  {c}" for c in changes))
    else:
        write_json(out / RUN, options)
    print_summary(console, trainer)
    try:
        result = trainer.train()
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    print_result(console, trainer, result)
    return result


# --- from options to objects ---


def train_config(options: dict[str, Any]) -> TrainConfig:
    """The TrainConfig that the command's options mean."""
    same = {field.name for field in dataclasses.fields(TrainConfig)} & options.keys() - {"context"}
    return TrainConfig(
        **{name: options[name] for name in same}
        | {
            "max_grad_norm": options["max_grad_norm"] or None,
            "eval_tokens": options["eval_tokens"] or None,
            "sample_prompt": options["prompt"],
        }
    )


def model_config(options: dict[str, Any], vocab_size: int) -> GPTConfig:
    """The preset with the changes that the options ask for."""
    changes = {name: options[name] for name in ("layers", "heads", "width", "context") if options[name] is not None}
    return GPTConfig.preset(options["preset"], vocab_size=vocab_size, **changes)


def parse_ops(text: str) -> str | dict[str, str]:
    """ "fused" -> itself; "attention=torch,gelu=reference" -> a mapping. GPT checks the names."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name.strip() and backend.strip() for name, _, backend in pairs):
        raise ValueError(f"--ops {text!r} must be one backend's name, or operator=backend separated by commas")
    return {name.strip(): backend.strip() for name, _, backend in pairs}


def prepare_tokens(out: Path, options: dict[str, Any], console: Console) -> tuple[TokenFile, Tokenizer]:
    """The text as tokens, and their tokenizer; writes them into ``out`` unless the source is a file of tokens."""
    sources = options["sources"]
    if sources and len(sources) == 1 and Path(sources[0] + ".json").is_file():
        tokens, tokenizer = TokenFile(sources[0]), make_tokenizer(options["tokenizer"])
        tokens.check_tokenizer(tokenizer)
        return tokens, tokenizer
    documents = _documents(options)
    tokenizer = _tokenizer(options["tokenizer"], documents, console)
    many = sum(1 for _ in islice(documents(), _MANY_DOCUMENTS)) == _MANY_DOCUMENTS
    with console.status("Turning the text into tokens"):
        tokens = write_tokens(
            out / TOKENS,
            encode_documents(documents(), tokenizer),
            tokenizer.vocab_size,
            tokenizer.describe(),
            validation_fraction=options["validation_fraction"] if many else 0.0,
            seed=options["seed"],
        )
    return tokens, tokenizer


def split_tokens(tokens: TokenFile, validation_fraction: float) -> tuple[TokenFile, TokenFile]:
    """Training and validation part: whole documents where some were set aside, otherwise the end of the text."""
    return tokens.split(None if tokens.has_validation else validation_fraction)


def _documents(options: dict[str, Any]) -> Callable[[], Iterable[str]]:
    """A function that gives the documents from the first one each time it is called."""
    if not options["sources"]:
        return python_corpus
    reading = {"text_field": options["text_field"], "separator": options["separator"]}
    if "-" in options["sources"]:  # can be read only once
        documents = list(read_documents(options["sources"], **reading))
        return lambda: documents
    return lambda: read_documents(options["sources"], **reading)


def _tokenizer(name: str, documents: Callable[[], Iterable[str]], console: Console) -> Tokenizer:
    if not name.startswith("bpe:"):
        return make_tokenizer(name)
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"--tokenizer {name!r}: after bpe: comes the number of ids, as in bpe:4096")
    with console.status("Learning the tokenizer from the text"):
        return BPETokenizer.train(documents(), int(size))


def _given(context: typer.Context) -> set[str]:
    """The names of the options that stand on the command line."""
    return {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}


def _resumed_options(out: Path, options: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The options of the run in ``out``, and those given now."""
    if not (out / RUN).is_file():
        raise FileNotFoundError(f"there is no run to resume in {out}: {RUN} is missing")
    fixed = given & {"sources", "tokenizer", "validation_fraction", "text_field", "separator"}
    if fixed:
        names = ", ".join("SOURCES" if name == "sources" else "--" + name.replace("_", "-") for name in sorted(fixed))
        raise ValueError(f"a resumed run keeps its text: {names} cannot go with --resume")
    return {**options, **read_json(out / RUN), **{name: options[name] for name in given & options.keys()}}


# --- what is said before and after ---


def print_summary(console: Console, trainer: Trainer) -> None:
    """What is about to be trained, on what, for how long."""
    shape, config = trainer.model.config, trainer.config
    train_size, validation_size = len(trainer.train_tokens), len(trainer.validation_tokens or ())
    step_tokens = config.batch_size * trainer.context
    rows = {
        "Text": f"{train_size:,} tokens to train on, {validation_size:,} to measure on ({trainer.train_tokens.path})",
        "Model": f"{trainer.model.num_parameters():,} parameters: {shape.layers} layers, {shape.heads} heads, "
        f"width {shape.width}, context {shape.context}",
        "Training": f"{config.steps:,} steps of {config.batch_size} x {trainer.context} = {step_tokens:,} tokens "
        f"({config.steps * step_tokens / train_size:.1f} times through the text), {config.dtype}, seed {config.seed}",
        "Operators": f"{trainer.model.ops.spec}, {torch.get_num_threads()} threads",
        "Folder": str(trainer.out),
    }
    if trainer.tokenizer is not None:
        rows["Tokenizer"] = f"{trainer.tokenizer.kind}, {trainer.tokenizer.vocab_size:,} ids"
    _print_rows(console, rows)


def print_result(console: Console, trainer: Trainer, result: TrainResult) -> None:
    """How it ended, and where things lie."""
    out = trainer.out
    assert out is not None  # the commands always have one
    if result.stopped == "interrupted":
        again = f"[bold]fastgpt train --out {out} --resume[/bold]"
        console.print(f"\nStopped at step {result.step:,} and saved. To go on: {again}")
    else:
        early = " (stopped early)" if result.stopped == "early" else ""
        console.print(f"\nTrained {result.step:,} steps in {result.seconds:,.0f} s{early}.")
    rows = {"Last checkpoint": str(result.checkpoint), "Loss curve": str(out / CURVE), "Metrics": str(out / METRICS)}
    if trainer.best is not None:
        loss, step = trainer.best
        rows |= {
            "Best validation loss": f"{loss:.4f} nats per token, at step {step:,}",
            "Entropy of single tokens": f"{trainer.unigram_entropy:.4f} nats per token",
        }
    _print_rows(console, rows)
    for (name, why), count in sorted(fastgpt.fallbacks().items()):
        console.print(f"[yellow]note:[/yellow] {name} fell back to the reference {count:,} times: {why}")
    if result.stopped != "interrupted":
        console.print(f"Let it write: [bold]fastgpt generate --model {out}[/bold]")


def _print_rows(console: Console, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(Text(f"{name:{width}}  {text}"))
