"""The trainer: arithmetic, determinism, resumption bit for bit, and every way in which training may end."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import fastgpt
from fastgpt import checkpoint, metrics, train_config
from fastgpt.data import TokenFile, sequential_batches, write_tokens
from fastgpt.interrupt import exclusive
from fastgpt.progress import printable
from fastgpt.tokenizers import ByteTokenizer
from fastgpt.training import Evaluation, parameter_groups
from tests import tiny


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of each training step in a run's metrics."""
    return [(r["step"], r["loss"]) for r in metrics.read_metrics(run / "metrics.jsonl") if "loss" in r]


# --- TrainConfig ---


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("steps", 0, "steps=0 must be at least 1"),
        ("steps", 2.5, "steps=2.5 must be an int"),
        ("batch_size", -4, "batch_size=-4 must be at least 1"),
        ("batch_size", True, "batch_size=True must be an int"),
        ("micro_batch_size", 0, "micro_batch_size=0 must be at least 1"),
        ("seed", -1, "seed=-1 must be at least 0"),
        ("lr", 0.0, r"lr=0\.0 must be finite, above 0"),
        ("lr", math.nan, "lr=nan must be finite, above 0"),
        ("lr", "fast", "lr='fast' must be a number"),
        ("min_lr", 1.0, r"min_lr=1\.0 must be finite, at least 0 and at most 0\.001"),
        ("warmup_steps", 1001, "warmup_steps=1001 must be at most steps=1000"),
        ("weight_decay", -0.1, r"weight_decay=-0\.1 must be finite, at least 0"),
        ("betas", (0.9, 1.0), r"betas=\(0\.9, 1\.0\) must be two numbers in \[0, 1\)"),
        ("max_grad_norm", 0, "max_grad_norm=0 must be finite, above 0"),
        ("dtype", "float16", "dtype='float16' is unknown; allowed are 'float32', 'bfloat16'"),
        ("patience", 0, "patience=0 must be at least 1"),
        ("keep", 0, "keep=0 must be at least 1"),
        ("eval_every", -1, "eval_every=-1 must be at least 0"),
    ],
)
def test_impossible_settings_are_named(name, value, error):
    with pytest.raises((ValueError, TypeError), match=f"TrainConfig: {error}"):
        fastgpt.TrainConfig(**{name: value})


def test_learning_rate():
    config = fastgpt.TrainConfig(steps=110, lr=1.0, min_lr=0.2, warmup_steps=10)
    assert [config.learning_rate(step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert config.learning_rate(60) == pytest.approx(0.6)  # half-way between lr and min_lr
    assert config.learning_rate(110) == pytest.approx(0.2)
    rates = [config.learning_rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert fastgpt.TrainConfig(steps=1, warmup_steps=0).learning_rate(1) == pytest.approx(1e-4)


def test_matrices_and_embeddings_decay_and_nothing_else():
    model = tiny.model(tie_weights=False)
    decaying, others = parameter_groups(model, 0.3)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    decaying_names = {names[id(p)] for p in decaying["params"]}
    assert {"token_embedding", "position_embedding", "head", "blocks.1.mlp.down.weight"} <= decaying_names
    assert all("norm" not in name and "bias" not in name for name in decaying_names)
    assert len(decaying["params"]) + len(others["params"]) == len(names)


# --- arithmetic ---


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 100])
def test_micro_batches_add_up_to_one_batch(tmp_path, monkeypatch, micro_batch_size):
    """In float64, where nothing but the order of additions differs; rows with different numbers of targets."""
    monkeypatch.setitem(train_config.DTYPES, "float32", torch.float64)

    def run(micro_batch_size):
        trainer = tiny.trainer(tmp_path, batch_size=5, micro_batch_size=micro_batch_size)
        inputs, targets = next(trainer.loader)
        targets[0, 3:] = targets[2, :] = targets[4, :7] = -100
        trainer.loader = iter([(inputs, targets)] * 3)
        results = [trainer.train_step() for _ in range(3)]
        return results, dict(trainer.model.double().named_parameters())

    whole, weights = run(None)
    parts, same_weights = run(micro_batch_size)
    for a, b in zip(whole, parts, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-12)
    for name, weight in weights.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(same_weights[name], weight, rtol=0, atol=1e-9)


def test_micro_batches_of_bfloat16_add_up_in_float32(tmp_path):
    whole = tiny.trainer(tmp_path, dtype="bfloat16", batch_size=16)
    parts = tiny.trainer(tmp_path, dtype="bfloat16", batch_size=16, micro_batch_size=1)
    norms = [trainer.train_step().grad_norm for trainer in (whole, parts)]
    assert norms[1] == pytest.approx(norms[0], rel=2**-8)  # sixteen roundings to bfloat16 would be off by more
    assert parts.optimizer.state_dict()["state"][0]["master"].dtype == torch.float32


def test_the_loss_is_the_mean_over_the_tokens(tmp_path):
    trainer = tiny.trainer(tmp_path)
    inputs, targets = next(trainer.loader)
    trainer.loader = iter([(inputs, targets)])
    with torch.no_grad():
        logits = trainer.model(inputs).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    result = trainer.train_step()
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.tokens == 4 * tiny.CONTEXT


def test_bfloat16_parameters_have_float32_masters(tmp_path):
    trainer = tiny.trainer(tmp_path, dtype="bfloat16")
    trainer.train_step()
    for parameter, state in trainer.optimizer.state.items():
        assert parameter.dtype == torch.bfloat16
        assert state["master"].dtype == state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["master"].bfloat16(), parameter)


def test_it_learns(tmp_path):
    trainer = tiny.trainer(tmp_path, steps=60, eval_every=60)
    result = trainer.train()
    assert result.evaluation is not None
    assert result.evaluation.validation_loss < 0.7 * trainer.unigram_entropy


# --- evaluation ---


def test_evaluation_is_over_every_whole_window(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_tokens=None)
    evaluation = trainer.evaluate()
    total = count = text_bytes = 0
    assert trainer.validation_tokens is not None
    for inputs, targets in sequential_batches(trainer.validation_tokens, 1, tiny.CONTEXT):
        with torch.no_grad():
            logits = trainer.model(inputs).double()
        total += torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum").item()
        count += targets.numel()
        text_bytes += int((targets < 256).sum())
    assert evaluation.tokens == count == (len(trainer.validation_tokens) - 1) // tiny.CONTEXT * tiny.CONTEXT
    assert evaluation.validation_loss == pytest.approx(total / count, rel=1e-6)
    assert text_bytes < count  # documents end in it
    assert evaluation.nats_per_byte == pytest.approx(total / text_bytes, rel=1e-6)
    assert evaluation.bits_per_byte == pytest.approx(total / text_bytes / math.log(2), rel=1e-6)
    assert evaluation.perplexity == pytest.approx(math.exp(total / count), rel=1e-6)


@pytest.mark.parametrize(("limit", "expected"), [(1, 16), (16, 16), (47, 32), (48, 48), (80, 80), (96, 96)])
def test_evaluation_stops_at_its_limit(tmp_path, limit, expected):
    assert tiny.trainer(tmp_path, eval_tokens=limit, batch_size=3).evaluate().tokens == expected


def test_evaluation_changes_nothing(tmp_path):
    one, other = tiny.trainer(tmp_path), tiny.trainer(tmp_path)
    for _ in range(3):
        one.evaluate()
        assert one.train_step().loss == other.train_step().loss


def test_unigram_entropy():
    tokens = np.array([0, 1, 1, 3, 3, 3, 3, 0], dtype=np.uint16)
    assert metrics.unigram_entropy(tokens, 5) == pytest.approx(1.5 * math.log(2))


# --- the same bits ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_steps_are_five_and_five(tmp_path, dtype):
    straight = tiny.trainer(tmp_path, out=tmp_path / "straight", dtype=dtype)
    straight.train()

    first = tiny.trainer(tmp_path, out=tmp_path / "parts", dtype=dtype)
    stop_after(first, 5)
    assert first.train().stopped == "interrupted"
    torch.manual_seed(12345)
    second = tiny.trainer(tmp_path, out=tmp_path / "parts", dtype=dtype, seed=99)  # other weights: all must be replaced
    assert second.resume() == []
    assert second.step == 5
    result = second.train()

    assert (result.step, result.stopped) == (10, "finished")
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "parts")) == 10
    assert tiny.bits(second.model) == tiny.bits(straight.model)
    assert (second.best, result.evaluation) == (straight.best, straight.evaluation)
    files = [
        (checkpoint.find_checkpoint(tmp_path / run) / "optimizer.safetensors").read_bytes()
        for run in ("straight", "parts")
    ]
    assert files[0] == files[1]


def stop_after(trainer, step, signals=(signal.SIGINT,)):
    """The trainer receives ``signals`` at the end of that step."""
    real = trainer.train_step

    def train_step():
        result = real()
        if result.step == step:
            for number in signals:
                signal.raise_signal(number)
        return result

    trainer.train_step = train_step


def test_the_same_seed_gives_the_same_losses(tmp_path):
    runs = []
    for name in ("a", "b"):
        tiny.trainer(tmp_path, out=tmp_path / name).train()
        runs.append(
            [
                {k: v for k, v in r.items() if k != "seconds"}
                for r in metrics.read_metrics(tmp_path / name / "metrics.jsonl")
            ]
        )
    assert runs[0] == runs[1]
    tiny.trainer(tmp_path, out=tmp_path / "c", seed=1).train()
    assert losses(tmp_path / "c") != losses(tmp_path / "a")


def test_resuming_says_what_has_changed(tmp_path):
    tiny.trainer(tmp_path, out=tmp_path / "run").train()
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", steps=12, lr=0.5)
    changes = trainer.resume()
    assert "steps was 10 and is now 12" in changes
    assert "lr was 0.01 and is now 0.5" in changes
    assert trainer.train().step == 12
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 13))


def test_resuming_a_finished_run_trains_nothing(tmp_path):
    done = tiny.trainer(tmp_path, out=tmp_path / "run").train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run")
    trainer.resume()
    assert trainer.train() == done
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_in_another_folder_leaves_the_first_alone(tmp_path):
    tiny.trainer(tmp_path, out=tmp_path / "first", steps=5).train()
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    trainer = tiny.trainer(tmp_path, out=tmp_path / "second")
    trainer.resume(tmp_path / "first")
    trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == before
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "second")][-1] == "step-00000010"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"seed": 7}, "seed was 0 and is now 7"),
        ({"context": 8}, "context was 16 and is now 8"),
        ({"dtype": "bfloat16"}, r"is torch\.float32, the model's torch\.bfloat16"),
    ],
)
def test_what_cannot_be_resumed_is_named(tmp_path, change, error):
    tiny.trainer(tmp_path, out=tmp_path / "run", steps=1).train()
    train, validation = tiny.tokens(tmp_path)
    trainer = fastgpt.Trainer(tiny.model(), tiny.config(**change), train, validation, out=tmp_path / "run")
    with pytest.raises(ValueError, match=error):
        trainer.resume()


# --- every way to end ---


def test_ctrl_c_saves_and_sigterm_too(tmp_path):
    for name, number in (("int", signal.SIGINT), ("term", signal.SIGTERM)):
        trainer = tiny.trainer(tmp_path, out=tmp_path / name)
        stop_after(trainer, 3, [number])
        result = trainer.train()
        assert (result.step, result.stopped) == (3, "interrupted")
        assert result.checkpoint == checkpoint.find_checkpoint(tmp_path / name)
        assert checkpoint.step_of(result.checkpoint) == 3
        assert (tmp_path / name / "loss.png").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run")
    stop_after(trainer, 3, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")] == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite(tmp_path, broken, max_grad_norm):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", save_every=3, eval_every=0, max_grad_norm=max_grad_norm)
    real = trainer.train_step

    def train_step():
        if trainer.step == 4:
            if broken == "loss":
                trainer.model.norm.weight.data[0] = math.nan
            else:
                trainer.model.token_embedding.register_hook(lambda gradient: gradient * math.inf)
        return real()

    trainer.train_step = train_step
    name = "loss" if broken == "loss" else "gradient norm"
    with pytest.raises(
        FloatingPointError, match=rf"the {name} became (nan|inf) at step 5 .*step-00000003\. A lower lr"
    ):
        trainer.train()
    model = checkpoint.load_model(tmp_path / "run")
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(losses(tmp_path / "run")) == 4


def evaluations(trainer, values):
    """The trainer's evaluations give these losses."""
    remaining = iter(values)
    trainer.evaluate = lambda: Evaluation(next(remaining), None, 1)


def test_early_stopping(tmp_path):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", eval_every=1, patience=2, steps=20, keep=1)
    evaluations(trainer, [5.0, 4.0, 4.5, 3.0, 3.5, 3.0, 1.0])
    result = trainer.train()
    assert (result.step, result.stopped) == (5, "early")
    assert trainer.best == (3.0, 3)
    assert checkpoint.find_checkpoint(tmp_path / "run" / "best").name == "step-00000003"
    assert checkpoint.find_checkpoint(tmp_path / "run").name == "step-00000005"


def test_patience_survives_resuming(tmp_path):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", eval_every=1, patience=3, steps=20)
    evaluations(trainer, [5.0, 5.5, 5.5])
    stop_after(trainer, 2)
    trainer.train()
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", eval_every=1, patience=3, steps=20)
    trainer.resume()
    evaluations(trainer, [5.5, 1.0])
    assert trainer.train().step == 3


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", eval_every=2, save_every=1, keep=2)
    evaluations(trainer, [9.0, 8.0, 1.0, 8.0, 8.0, 8.0])
    trainer.train()
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")] == [4, 9, 10]


def test_what_a_killed_process_left_is_removed(tmp_path):
    unfinished = tmp_path / "run" / "checkpoints" / ".step-00000003.4711.0a1b2c3d.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text("{")
    tiny.trainer(tmp_path, out=tmp_path / "run", steps=1).train()
    assert [path.name for path in unfinished.parent.iterdir()] == ["step-00000001"]


def test_without_a_folder_nothing_is_written(tmp_path):
    trainer = tiny.trainer(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = trainer.train()
    assert result.checkpoint is None
    assert sorted(tmp_path.rglob("*")) == before
    for method in (trainer.save, trainer.plot, trainer.resume):
        with pytest.raises(ValueError, match="no out"):
            method()


def test_without_validation_tokens(tmp_path):
    train, _ = tiny.tokens(tmp_path)
    trainer = fastgpt.Trainer(tiny.model(), tiny.config(), train, out=tmp_path / "run", console=Console(quiet=True))
    assert trainer.train().evaluation is None
    with pytest.raises(ValueError, match="no validation tokens"):
        trainer.evaluate()
    with pytest.raises(FileNotFoundError, match="no checkpoint with a validation loss"):
        checkpoint.find_checkpoint(tmp_path / "run" / "best")


# --- what is refused ---


def test_data_that_does_not_fit(tmp_path):
    train, validation = tiny.tokens(tmp_path)
    most = (len(train) - 1) // tiny.CONTEXT
    with pytest.raises(
        ValueError, match=f"batch_size={most + 1} must be at most {most}: the {len(train):,} training tokens"
    ):
        fastgpt.Trainer(tiny.model(), tiny.config(batch_size=most + 1), train, validation)
    fastgpt.Trainer(tiny.model(), tiny.config(batch_size=most), train, validation)
    with pytest.raises(ValueError, match="context=17 must be at most the model's context of 16"):
        fastgpt.Trainer(tiny.model(), tiny.config(context=17), train, validation)
    with pytest.raises(ValueError, match="train tokens have a vocabulary of 257, the model one of 256"):
        fastgpt.Trainer(tiny.model(vocab_size=256), tiny.config(), train, validation)
    with pytest.raises(ValueError, match="validation tokens, but a context of 512 needs at least 513"):
        fastgpt.Trainer(tiny.model(context=512), tiny.config(batch_size=1), train, validation)
    with pytest.raises(ValueError, match="patience=1 needs validation tokens"):
        fastgpt.Trainer(tiny.model(), tiny.config(patience=1), train)
    with pytest.raises(ValueError, match="sample_every=1 needs a tokenizer"):
        fastgpt.Trainer(tiny.model(), tiny.config(sample_every=1), train)
    other = write_tokens(
        tmp_path / "other.bin", [[1, 2, 3] * 50], 100, {**ByteTokenizer().describe(), "fingerprint": "x"}
    )
    with pytest.raises(ValueError, match="written with another tokenizer"):
        fastgpt.Trainer(tiny.model(), tiny.config(), TokenFile(other.path), tokenizer=ByteTokenizer())


def test_a_folder_that_holds_another_run(tmp_path):
    tiny.trainer(tmp_path, out=tmp_path / "run").train()
    with pytest.raises(
        FileExistsError, match=r"holds a run that has come to step 10, and this one is at step 0: resume"
    ):
        tiny.trainer(tmp_path, out=tmp_path / "run").train()
    assert len(losses(tmp_path / "run")) == 10


def test_two_processes_in_one_folder(tmp_path):
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(BlockingIOError, match="another process is training in this folder"),
    ):
        tiny.trainer(tmp_path, out=tmp_path / "run").train()


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file/run"):
        tiny.trainer(tmp_path, out=tmp_path / "file" / "run").train()


# --- what is shown and kept ---


def test_plain_lines(tmp_path):
    trainer = tiny.trainer(tmp_path, log_every=4)
    trainer.console = console = tiny.recorder()
    trainer.train()
    lines = console.file.getvalue().splitlines()
    steps = [line.split()[1] for line in lines if "tokens/s" in line]
    assert steps == ["1/10", "4/10", "8/10", "10/10"]
    assert sum("validation loss" in line for line in lines) == 3
    assert all(not line.startswith("\x1b") for line in lines)


def test_no_escape_sequence_of_a_model_reaches_the_terminal():
    assert printable("a\tb\nc\x1b[31m\x07é漢\r") == "a\tb\nc\ufffd[31m\ufffdé漢\ufffd"


def test_a_live_bar_on_a_terminal(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.console = console = tiny.recorder(terminal=True)
    trainer.train()
    shown = console.file.getvalue()
    for text in ("training", "10/10", "loss ", "tokens/s", "0:00 left", "step 5: validation loss"):
        assert text in shown


def test_metrics_after_a_kill_have_no_step_twice(tmp_path):
    run = tmp_path / "run"
    trainer = tiny.trainer(tmp_path, out=run, save_every=4, eval_every=0)
    stop_after(trainer, 7, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    trainer = tiny.trainer(tmp_path, out=run, save_every=4, eval_every=0)
    trainer.resume()
    trainer.train()
    assert [step for step, _ in losses(run)] == list(range(1, 11))


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a record of metrics: 'nonsense"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_hold_every_step_and_evaluation(tmp_path):
    tiny.trainer(tmp_path, out=tmp_path / "run").train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 5, 10]
    assert set(records[1]) == {"step", "loss", "grad_norm", "lr", "tokens", "seconds"}
    assert set(records[0]) == {"step", "validation_loss", "nats_per_byte", "bits_per_byte", "perplexity", "tokens"}


def test_the_loss_curve_is_a_picture(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "loss.png"
    records = [{"step": i, "loss": 5.0 / (i + 1)} for i in range(100)] + [{"step": 99, "validation_loss": 1.0}]
    metrics.plot_losses(path, records, unigram=3.0, title="a curve")
    with_line = imread(path)
    assert with_line.shape == (540, 960, 4)
    metrics.plot_losses(path, records)
    assert not np.array_equal(imread(path), with_line)
    metrics.plot_losses(path, [])  # a run that was stopped before its first step


def test_smoothing():
    assert metrics.smooth([2.0, 2.0, 2.0], 10) == pytest.approx([2.0, 2.0, 2.0])
    assert metrics.smooth([0.0, 3.0], 3) == pytest.approx([0.0, 2.0])  # weights 1/2 and 1/4, over their sum
    assert metrics.smooth([1.0, 5.0], 1) == [1.0, 5.0]


def test_samples_on_the_way(tmp_path):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", sample_every=5, sample_prompt="line", sample_tokens=5)
    trainer.console = console = tiny.recorder()
    trainer.train()
    samples = [r for r in metrics.read_metrics(tmp_path / "run" / "metrics.jsonl") if "sample" in r]
    assert [r["step"] for r in samples] == [5, 10]
    assert all(r["sample"].startswith("line") for r in samples)
    assert "step 5, a sample:\nline" in console.file.getvalue()
    assert trainer.sample() == trainer.sample()


def test_samples_change_no_loss(tmp_path):
    tiny.trainer(tmp_path, out=tmp_path / "with", sample_every=1, sample_tokens=3).train()
    tiny.trainer(tmp_path, out=tmp_path / "without").train()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_tensorboard(tmp_path):
    train, _ = tiny.tokens(tmp_path)
    with pytest.raises(ValueError, match="tensorboard=True needs out"):
        fastgpt.Trainer(tiny.model(), tiny.config(), train, tensorboard=True)
    trainer = fastgpt.Trainer(
        tiny.model(), tiny.config(), train, out=tmp_path / "run", tensorboard=True, console=Console(quiet=True)
    )
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            trainer.train()
    else:
        trainer.train()
        assert list((tmp_path / "run" / "tensorboard").iterdir())


# --- processes ---


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(tmp_path):
    """SIGKILL at some moment of a real process; a second process goes on; the losses are those of an unbroken run."""
    root = Path(__file__).parents[1]
    script = f"""
import sys; sys.path.insert(0, {str(root)!r})
from pathlib import Path
from tests import tiny
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
trainer = tiny.trainer(folder, out=out, steps=60, save_every=5, eval_every=20)
if (out / "checkpoints").exists():
    trainer.resume()
real = trainer.train_step
def train_step():
    print(trainer.step, flush=True)
    return real()
trainer.train_step = train_step
trainer.train()
"""

    def start(out):
        command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    process = start("broken")
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 23:
            process.kill()
            break
    process.communicate()
    assert checkpoint.step_of(checkpoint.find_checkpoint(tmp_path / "broken")) >= 20
    for out in ("broken", "whole"):
        process = start(out)
        process.communicate()
        assert process.returncode == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    bits = [tiny.bits(checkpoint.load_model(tmp_path / out)) for out in ("broken", "whole")]
    assert bits[0] == bits[1]
