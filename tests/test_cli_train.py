"""``fastgpt train`` and ``fastgpt demo``, as a person types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgpt import checkpoint, metrics
from fastgpt.cli import app, demo
from fastgpt.cli.train import parse_ops
from fastgpt.config import GPTConfig
from fastgpt.ops.native import _C
from fastgpt.tokenizers import load_tokenizer

TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "4", "--eval-every", "5"]


def run(*arguments: str | Path, stdin: str | None = None):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)), input=stdin)


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in metrics.read_metrics(out / "metrics.jsonl") if "loss" in r]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(200)))
    return path


def train(book, out, *more, steps=10):
    return run("train", book, "--out", out, "--steps", str(steps), *TINY, *more)


def test_a_run_from_text_to_model(tmp_path, book):
    result = train(book, tmp_path / "run")
    assert result.exit_code == 0, result.output
    for text in (
        "6,331 tokens to train on, 704 to measure on",
        "bytes, 257 ids",
        "1 layers, 2 heads, width 16, context 16",
        "10 steps of 4 x 16 = 64 tokens",
        "fused",
        "Trained 10 steps",
        "Entropy of single tokens",
        str(tmp_path / "run" / "checkpoints" / "step-00000010"),
        str(tmp_path / "run" / "loss.png"),
        f"fastgpt generate --model {tmp_path / 'run'}",
    ):
        assert text in result.output
    assert (tmp_path / "run" / "loss.png").is_file()
    model = checkpoint.load_model(tmp_path / "run")
    assert model.config == GPTConfig.preset("demo", vocab_size=257, layers=1, heads=2, width=16, context=16)
    assert load_tokenizer(checkpoint.find_checkpoint(tmp_path / "run")).kind == "bytes"
    assert len(losses(tmp_path / "run")) == 10


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path, book):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(book, straight)
    train(book, broken, "--save-every", "5", "--keep", "3")
    for path in checkpoint.list_checkpoints(broken):
        if checkpoint.step_of(path) > 5:
            checkpoint.remove_checkpoint(path)
    result = run("train", "--out", broken, "--resume")
    assert result.exit_code == 0, result.output
    assert "Going on from step 5 of 10" in result.output
    assert losses(broken) == losses(straight)


def test_resuming_with_other_options(tmp_path, book):
    out = tmp_path / "run"
    train(book, out)
    result = run("train", "--out", out, "--resume", "--steps", "14", "--lr", "0.002")
    assert result.exit_code == 0, result.output
    assert "steps was 10 and is now 14" in result.output
    assert "lr was 0.001 and is now 0.002" in result.output
    assert len(losses(out)) == 14
    result = run("train", "--out", out, "--resume", "--width", "32")
    assert result.exit_code == 1
    assert "another config: width is 16 there and 32 here" in result.output
    result = run("train", book, "--out", out, "--resume", "--tokenizer", "bytes")
    assert result.exit_code == 1
    assert "a resumed run keeps its text: SOURCES, --tokenizer cannot go with --resume" in result.output
    assert len(losses(out)) == 14


def test_a_tokenizer_learnt_from_the_text(tmp_path, book):
    result = train(book, tmp_path / "run", "--tokenizer", "bpe:300", steps=2)
    assert result.exit_code == 0, result.output
    tokenizer = load_tokenizer(checkpoint.find_checkpoint(tmp_path / "run"))
    assert (tokenizer.kind, tokenizer.vocab_size) == ("bpe", 300)
    again = train(
        tmp_path / "run" / "tokens.bin",
        tmp_path / "again",
        "--tokenizer",
        str(checkpoint.find_checkpoint(tmp_path / "run")),
        steps=2,
    )
    assert again.exit_code == 0, again.output
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    other = train(tmp_path / "run" / "tokens.bin", tmp_path / "other", steps=2)
    assert other.exit_code == 1
    assert "written with another tokenizer" in other.output


def test_text_from_stdin(tmp_path, book):
    result = CliRunner().invoke(
        app,
        ["train", "-", "--out", str(tmp_path / "run"), "--steps", "2", "--tokenizer", "bpe:270", *TINY],
        input=book.read_text(),
    )
    assert result.exit_code == 0, result.output


def test_many_documents_are_split_whole(tmp_path):
    lines = [json.dumps({"text": f"document {i} is about {i}"}) for i in range(300)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    result = train(tmp_path / "many.jsonl", tmp_path / "run", steps=2)
    assert result.exit_code == 0, result.output
    description = json.loads((tmp_path / "run" / "tokens.bin.json").read_text())
    assert description["train_count"] < description["count"]


def test_ops_by_name():
    assert parse_ops("fused") == "fused"
    assert parse_ops("attention=torch, gelu=reference") == {"attention": "torch", "gelu": "reference"}
    with pytest.raises(ValueError, match="operator=backend"):
        parse_ops("attention=")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--batch-size", "-1"], "batch_size=-1 must be at least 1"),
        (["--batch-size", "100000"], "batch_size=100000 must be at most"),
        (["--lr", "-1"], "lr=-1.0 must be finite, above 0"),
        (["--lr", "nan"], "lr=nan must be finite"),
        (["--heads", "3"], "width=16 does not divide into heads=3"),
        (["--context", "100000"], "needs at least 100001"),
        (["--ops", "gpu"], "no backend 'gpu'"),
        pytest.param(
            ["--ops", "cuda"],
            "cannot have the backend 'cuda': CUDA is not in this build",
            marks=pytest.mark.skipif(_C.cuda.compiled, reason="this build has CUDA"),
        ),
        (["--ops", "attention=quick"], "no backend 'quick'"),
        (["--preset", "gpt5"], "preset='gpt5' is unknown"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--tokenizer", "words"], "no tokenizer 'words'"),
        (["--tokenizer", "bpe:lots"], "as in bpe:4096"),
        (["--tokenizer", "bpe:10"], "vocab_size must be at least 257"),
        (["--validation-fraction", "1.5"], "must be above 0 and below 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--wings", "2"], "No such option"),
    ],
)
def test_bad_options_are_named(tmp_path, book, options, error):
    result = train(book, tmp_path / "run", *options, steps=2)
    assert result.exit_code != 0
    assert error in re.sub(r"[│\s]+", " ", result.output)
    assert "Traceback" not in result.output
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_bad_sources_and_folders(tmp_path, book):
    result = train(tmp_path / "nowhere.txt", tmp_path / "run")
    assert (result.exit_code, "no file or folder" in result.output) == (1, True)
    (tmp_path / "empty.txt").write_text("")
    result = train(tmp_path / "empty.txt", tmp_path / "run")
    assert (result.exit_code, "holds no text" in result.output) == (1, True)
    result = train(book, book / "run")
    assert (result.exit_code, "Not a directory" in result.output) == (1, True)
    result = run("train", "--resume", "--out", tmp_path / "none")
    assert (result.exit_code, "there is no run to resume" in result.output) == (1, True)
    train(book, tmp_path / "done", steps=2)
    before = sorted((tmp_path / "done").rglob("*"))
    result = train(book, tmp_path / "done", steps=2)
    assert (result.exit_code, "already holds a run: go on with it (--resume)" in result.output) == (1, True)
    assert sorted((tmp_path / "done").rglob("*")) == before


def test_a_damaged_checkpoint_is_named(tmp_path, book):
    train(book, tmp_path / "run", steps=2)
    path = checkpoint.find_checkpoint(tmp_path / "run") / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    result = run("train", "--resume", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "damaged: optimizer.safetensors has" in result.output


def test_help_for_a_newcomer():
    result = run("train", "--help")
    assert result.exit_code == 0
    for panel in ("Text", "Model", "Training", "Watching and keeping", "Example", "--resume", "By default the English"):
        assert panel in result.output


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path, book):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastgpt", "train", str(book), "--out", str(out), "--steps", "100000", *TINY]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    while len(metrics.read_metrics(out / "metrics.jsonl")) < 20 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130
    assert "Stopping after this step" in errors
    assert f"fastgpt train --out {out} --resume" in output
    step = len(losses(out))
    assert checkpoint.find_checkpoint(out) == checkpoint.checkpoint_path(out, step)
    result = run("train", "--out", out, "--resume", "--steps", str(step + 3))
    assert result.exit_code == 0, result.output
    assert len(losses(out)) == step + 3


# --- demo ---


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with a tiny model and text; the rest of it is the real one."""
    shape = {"layers": 1, "heads": 2, "width": 16, "context": 32}
    preset = GPTConfig.preset
    monkeypatch.setattr(GPTConfig, "preset", lambda name, **changes: preset(name, **changes, **shape))
    monkeypatch.setattr(demo, "python_corpus", lambda: [f"document {i}: {i * i}\n" * 5 for i in range(300)])
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 20)


def test_the_demo_and_its_second_run(tmp_path, small_demo):
    out = tmp_path / "demo"
    result = run("demo", "--out", out, "--steps", "8", "--compare", "7")
    assert result.exit_code == 0, result.output
    for text in (
        "fused",
        "reference",
        "torch",
        "steps/s",
        "largest loss difference",
        "nats per byte",
        "unigram entropy",
    ):
        assert text in result.output
    assert str(out / "loss.png") in result.output
    comparison = json.loads((out / "demo.json").read_text())["comparison"]
    for entry in comparison.values():
        assert len(entry["losses"]) == 9
        assert len(entry["seconds"]) == 7
        assert entry["losses"] == pytest.approx(comparison["reference"]["losses"], abs=1e-4)
    assert losses(out) == comparison["fused"]["losses"][:8]  # the same steps again, to the last digit

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run("demo", "--out", out, "--steps", "8", "--compare", "7")
    assert again.exit_code == 0, again.output
    assert "holds the finished run of these settings" in again.output
    assert "--fresh" in again.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    other = run("demo", "--out", out, "--steps", "9", "--compare", "7")
    assert other.exit_code == 1
    assert "steps was 8, now 9" in other.output
    fresh = run("demo", "--out", out, "--steps", "9", "--compare", "0", "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert len(losses(out)) == 9


def test_an_interrupted_demo_goes_on(tmp_path, small_demo, monkeypatch):
    out = tmp_path / "demo"
    real = demo.Trainer.train_step

    def interrupted(trainer):
        result = real(trainer)
        if trainer.out is not None and result.step == 5:
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(demo.Trainer, "train_step", interrupted)
        result = run("demo", "--out", out, "--steps", "8", "--compare", "2")
    assert result.exit_code == 130
    assert "The same command goes on from here" in result.output
    result = run("demo", "--out", out, "--steps", "8", "--compare", "2")
    assert result.exit_code == 0, result.output
    assert "going on from step 5" in result.output
    run("demo", "--out", tmp_path / "straight", "--steps", "8", "--compare", "0")
    assert losses(out) == losses(tmp_path / "straight")
