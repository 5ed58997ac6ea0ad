"""``fastgpt demo``: a GPT learns to write English from the documentation that comes with Python, in a few minutes."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt.checkpoint import find_checkpoint, list_checkpoints, load_model
from fastgpt.cli.errors import plain_errors
from fastgpt.cli.train import print_summary
from fastgpt.config import GPTConfig
from fastgpt.data import TokenFile, encode_documents, python_corpus, write_tokens
from fastgpt.files import read_json, write_json
from fastgpt.generation import generate
from fastgpt.model import GPT
from fastgpt.progress import printable
from fastgpt.tokenizers import ByteTokenizer
from fastgpt.train_config import TrainConfig
from fastgpt.training import CURVE, Trainer, TrainResult

TOKENS = "tokens.bin"
DEMO = "demo.json"  # in the run's folder: its settings, the comparison, how it ended
OPS = ("fused", "reference", "torch")
WARM_UP = 2  # steps of each that are not counted: memory and threads find their places
BLOCK = 5  # steps in a row with the same operators
STEPS = 1400
COMPARED = 20
BATCH_SIZE = 8
LR = 4e-3
PROMPTS = ("The ", "Return ", "")
SAMPLE_TOKENS = 240  # with the prompt, no more than the context of 256


def demo(
    out: Annotated[Path, typer.Option(help="The folder of the run.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train again, though the folder holds a run.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = STEPS,
    compare: Annotated[int, typer.Option(min=0, help="Steps to take with each kind of operators first.")] = COMPARED,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the order of the text and the samples.")] = 0,
) -> None:
    """Train a small GPT with the fused kernels, next to the reference and torch, and let it write.

    The text is the documentation that comes with Python: nothing is downloaded. The second time, the finished run is
    shown again, with new samples. An interrupted demo goes on where it was.
    """
    console = Console(highlight=False, soft_wrap=True)
    with plain_errors():
        config = TrainConfig(
            steps=steps,
            batch_size=BATCH_SIZE,
            lr=LR,
            eval_every=max(1, steps // 8),
            eval_tokens=1 << 15,
            save_every=max(1, steps // 8),
            keep=1,
            seed=seed,
        )
        settings = {"compare": compare, **dataclasses.asdict(config), "betas": list(config.betas)}
        state = _state(out, settings, fresh)
        if "result" in state:
            console.print(
                f"{out} holds the finished run of these settings; [bold]fastgpt demo --fresh[/bold] trains again.\n"
            )
            print_comparison(console, state["comparison"])
            print_outcome(console, out, state["result"], seed=secrets.randbelow(1 << 31))
            return
        result = run(console, out, config, compare, state | {"settings": settings})
    if result.stopped == "interrupted":
        console.print("\nStopped and saved. The same command goes on from here.")
        raise typer.Exit(130)


def run(console: Console, out: Path, config: TrainConfig, compare: int, state: dict[str, Any]) -> TrainResult:
    """Compares, trains and shows; continues what an interrupted demo has left in ``out``."""
    tokenizer = ByteTokenizer()
    if "comparison" not in state:
        console.print("[bold]1. The text[/bold]: the documentation that comes with Python, one token a byte")
        documents = encode_documents(python_corpus(), tokenizer)
        tokens = write_tokens(
            out / TOKENS, documents, tokenizer.vocab_size, tokenizer.describe(), validation_fraction=0.1
        )
        train, validation = tokens.split()
        if compare:
            console.print(f"\n[bold]2. The same {compare} steps[/bold] with fused kernels, the reference, and torch's")
        state["comparison"] = compare_ops(console, config, train, compare)
        write_json(out / DEMO, state)
    else:
        train, validation = TokenFile(out / TOKENS).split()
    print_comparison(console, state["comparison"])

    console.print("[bold]3. Training[/bold] with the fused kernels (Ctrl-C saves; the same command goes on)")
    trainer = Trainer(
        new_model("fused", config.seed), config, train, validation, tokenizer=tokenizer, out=out, console=console
    )
    if list_checkpoints(out):
        for change in trainer.resume():
            console.print(f"[yellow]note:[/yellow] {change}")
        console.print(f"going on from step {trainer.step}")
    print_summary(console, trainer)
    result = trainer.train()
    if result.stopped == "finished":
        assert result.evaluation is not None  # there is validation text
        text_bytes = np.count_nonzero(train.tokens != tokenizer.eos_id)
        state["result"] = {
            "validation_loss": result.evaluation.nats_per_byte,
            "unigram_entropy": trainer.unigram_entropy * len(train) / text_bytes,
            "seconds": result.seconds,
            "steps": result.step,
        }
        write_json(out / DEMO, state)
        print_outcome(console, out, state["result"], seed=config.seed)
    return result


def new_model(ops: str, seed: int) -> GPT:
    """The demo's model; the same seed gives the same weights whatever the operators."""
    torch.manual_seed(seed)
    return GPT(GPTConfig.preset("demo", vocab_size=ByteTokenizer().vocab_size), ops=ops)


def compare_ops(console: Console, config: TrainConfig, train: TokenFile, steps: int) -> dict[str, Any]:
    """The first steps of the run with each kind of operators: losses and seconds of every step.

    They take turns, a block of steps each, so that whatever else the machine does slows all of them alike.
    """
    trainers = {ops: Trainer(new_model(ops, config.seed), config, train, console=Console(quiet=True)) for ops in OPS}
    results: dict[str, list[Any]] = {ops: [] for ops in OPS}
    with console.status("warming up") as status:
        for ops, count in _turns(steps):
            status.update(f"{ops}: step {trainers[ops].step}")
            results[ops] += [trainers[ops].train_step() for _ in range(count)]
    return {
        ops: {
            "losses": [r.loss for r in taken],
            "seconds": [r.seconds for r in taken[WARM_UP:]],
            "tokens": taken[0].tokens,
        }
        for ops, taken in results.items()
        if taken
    }


def _turns(steps: int) -> Iterator[tuple[str, int]]:
    """Whose turn it is for how many steps: first the warm-up, then blocks, the first one to go changing each round."""
    if steps:
        yield from ((ops, WARM_UP) for ops in OPS)
    for round, start in enumerate(range(0, steps, BLOCK)):
        first = round % len(OPS)
        for ops in OPS[first:] + OPS[:first]:
            yield ops, min(BLOCK, steps - start)


def print_comparison(console: Console, comparison: dict[str, Any]) -> None:
    """Speed of each kind of operators, and how far its losses are from the reference's."""
    if not comparison:
        return
    median = {ops: statistics.median(entry["seconds"]) for ops, entry in comparison.items()}
    table = Table()
    table.add_column("operators")
    for name in ("steps/s", "tokens/s", "speed-up by fused", "loss at the last step", "largest loss difference"):
        table.add_column(name, justify="right")
    for ops, entry in comparison.items():
        differences = [abs(a - b) for a, b in zip(entry["losses"], comparison["reference"]["losses"], strict=True)]
        table.add_row(
            ops,
            f"{1 / median[ops]:.2f}",
            f"{entry['tokens'] / median[ops]:,.0f}",
            "" if ops == "fused" else f"{median[ops] / median['fused']:.2f} x",
            f"{entry['losses'][-1]:.6f}",
            "" if ops == "reference" else f"{max(differences):.1e}",
        )
    console.print(table, soft_wrap=False)
    first = next(iter(comparison.values()))
    console.print(
        f"[dim]medians of {len(first['seconds'])} steps of {first['tokens']:,} tokens, in turns of {BLOCK}; "
        f"differences from the reference's loss over all {len(first['losses'])} steps[/dim]\n"
    )


def print_outcome(console: Console, out: Path, result: dict[str, Any], seed: int) -> None:
    """What the finished run has learnt: its loss, samples of its text, and where it lies."""
    loss, entropy = result["validation_loss"], result["unigram_entropy"]
    console.print(
        f"\n[bold]Validation loss {loss:.4f} nats per byte[/bold] after {result['steps']:,} steps in "
        f"{result['seconds']:,.0f} s; a model of single bytes could reach {entropy:.4f} at best (the unigram entropy)."
    )
    model, tokenizer = load_model(out), ByteTokenizer()
    samples = generate(
        model,
        PROMPTS,
        SAMPLE_TOKENS,
        temperature=0.8,
        top_p=0.95,
        seed=[seed + i for i in range(len(PROMPTS))],
        tokenizer=tokenizer,
    )
    console.print(f"\n[bold]What it writes[/bold] (seed {seed}; the beginnings in bold are ours)")
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        console.rule(style="dim")
        console.print(Text(prompt, "bold") + Text(printable(sample.text or "")))
    console.rule(style="dim")
    console.print(f"\nCheckpoint  {find_checkpoint(out)}\nLoss curve  {out / CURVE}")
    console.print(f'More of it: [bold]fastgpt generate --model {out} --prompt "The "[/bold]')


def _state(out: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Any]:
    """What an earlier demo of these settings has left in ``out``; {} to start anew."""
    state = read_json(out / DEMO) if (out / DEMO).is_file() else {}
    if not fresh and state and state["settings"] != settings:
        differing = [
            f"{n} was {state['settings'].get(n)}, now {v}" for n, v in settings.items() if state["settings"].get(n) != v
        ]
        raise ValueError(
            f"{out} holds a demo of other settings ({'; '.join(differing)}): "
            "add --fresh to replace it, or choose another --out"
        )
    if fresh:
        _clear(out)
        return {}
    return state


def _clear(out: Path) -> None:
    """Deletes an earlier demo, and nothing that is none."""
    if (out / DEMO).is_file():
        shutil.rmtree(out)
