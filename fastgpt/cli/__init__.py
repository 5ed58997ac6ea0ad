"""The ``fastgpt`` command: one file here per subcommand, each with one function that this module registers."""

from __future__ import annotations

import typer

from fastgpt.cli import bench, demo, doctor, explain, gate, generate, gpu, predict, tokenize, train, train_tokenizer

app = typer.Typer(
    name="fastgpt",
    help="Fused GPT kernels, and a thin GPT model, trainer and sampler on top of them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("demo")(demo.demo)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("explain")(explain.explain)
app.command("gate")(gate.gate)
app.command("predict")(predict.predict)
app.command("gpu")(gpu.gpu)
app.command("tokenize")(tokenize.tokenize)
app.command("train-tokenizer")(train_tokenizer.train_tokenizer)


def main() -> None:
    """Entry point of the console script."""
    app()
