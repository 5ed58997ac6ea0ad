"""Training a GPT: batches, gradient accumulation, AdamW on a schedule, evaluation, checkpoints, and nothing else.

    trainer = Trainer(model, TrainConfig(steps=1000), train, validation, tokenizer=tokenizer, out="runs/mine")
    trainer.train()                       # Ctrl-C saves and returns
    trainer.resume(); trainer.train()     # in a new process: goes on bit for bit

The same seed, number of threads and machine give the same losses to the last digit.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import fastgpt
from fastgpt import checkpoint
from fastgpt.data import BatchLoader, TokenFile, sequential_batches
from fastgpt.generation import generate
from fastgpt.interrupt import GracefulStop, exclusive
from fastgpt.metrics import MetricsLog, plot_losses, read_metrics, unigram_entropy
from fastgpt.model import GPT
from fastgpt.ops.native import _C
from fastgpt.optim import AdamW
from fastgpt.progress import TrainingProgress
from fastgpt.train_config import DTYPES, TrainConfig

if TYPE_CHECKING:
    from fastgpt.tokenizers import Tokenizer

IGNORE_INDEX = -100
METRICS = "metrics.jsonl"
CURVE = "loss.png"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss (nats per token), gradient norm before clipping, learning rate, tokens, seconds."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Losses on the validation tokens.

    Attributes:
        validation_loss: nats per token.
        nats_per_byte: all of these nats over the bytes of the text (the end-of-text token has none); None without a
            tokenizer.
        tokens: how many were predicted.
    """

    validation_loss: float
    nats_per_byte: float | None
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(validation_loss)."""
        return math.exp(self.validation_loss) if self.validation_loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nats_per_byte / ln 2."""
        return None if self.nats_per_byte is None else self.nats_per_byte / math.log(2)

    def __str__(self) -> str:
        per_byte = f", {self.nats_per_byte:.4f} nats/byte" if self.nats_per_byte is not None else ""
        return f"validation loss {self.validation_loss:.6f}, perplexity {self.perplexity:.2f}{per_byte}"


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        step: the last step taken.
        stopped: "finished" | "early" (patience ran out) | "interrupted" (Ctrl-C or SIGTERM).
        evaluation: of the last step, or None.
        checkpoint: the last one, or None without ``out``.
        seconds: of training steps, evaluations left out, over all resumptions.
    """

    step: int
    stopped: str
    evaluation: Evaluation | None
    checkpoint: Path | None
    seconds: float


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: what has two dimensions or more decays; norms' weights and all biases do not.

    The embeddings decay too, as in GPT-2's and GPT-3's reimplementations: the token embedding is the output matrix as
    well wherever the two are tied.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Trainer:
    """Trains ``model`` on token files.

    A run's folder holds ``checkpoints/``, ``metrics.jsonl`` (a line a step and a line an evaluation) and ``loss.png``.

    Args:
        model: on the device to train on; its parameters are cast to config.dtype. AdamW is the one of its operators.
        config: how to train.
        train, validation: the tokens; without ``validation`` nothing is evaluated and no checkpoint is "best".
        tokenizer: goes into the checkpoints; also needed for nats per byte and samples.
        out: the run's folder; None: nothing is written.
        tensorboard: whether to write event files for TensorBoard too, into out/tensorboard.
        console: where progress is shown; default: standard output. Console(quiet=True) is silent.

    Raises:
        ValueError: tokens, context or vocabulary do not fit each other; fewer tokens than one batch.
    """

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        train: TokenFile,
        validation: TokenFile | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        out: str | os.PathLike[str] | None = None,
        tensorboard: bool = False,
        console: Console | None = None,
    ) -> None:
        self.context = model.config.context if config.context is None else config.context
        _check_data(model, config, train, validation, tokenizer, self.context)
        if tensorboard and out is None:
            raise ValueError("Trainer: tensorboard=True needs out, the folder to write into")
        self.model = model.to(DTYPES[config.dtype])
        if config.micro_batch_size is not None and config.dtype == "bfloat16":
            for parameter in self.model.parameters():
                parameter.grad_dtype = torch.float32  # or every micro-batch would round the sum to bfloat16
        self.config = config
        self.train_tokens, self.validation_tokens = train, validation
        self.tokenizer = tokenizer
        self.out = None if out is None else Path(out)
        self.console = Console() if console is None else console
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            max_grad_norm=config.max_grad_norm,
            backend=model.ops.backend("adamw"),
        )
        self.loader = BatchLoader(train, config.batch_size, self.context, seed=config.seed)
        self.step = 0
        self.seconds = 0.0
        self.best: tuple[float, int] | None = None  # lowest validation loss and its step
        self.evaluation: Evaluation | None = None  # of this very step
        self._bad_evaluations = 0  # in a row
        self._saved: int | None = None  # the step of the last checkpoint
        self._tensorboard = tensorboard
        torch.manual_seed(config.seed)

    # --- the loop ---

    def train(self) -> TrainResult:
        """Trains until the last step, until patience runs out, or until SIGINT (Ctrl-C) or SIGTERM, and saves.

        Raises:
            FileExistsError: ``out`` holds later steps of a run that was not resumed.
            BlockingIOError: another process trains in ``out``.
            FloatingPointError: the loss or the gradient is not finite; the last good checkpoint stays the last.
            OSError: a checkpoint cannot be written; the ones before it stay.
        """
        if self.out is None:
            with GracefulStop() as stop, self._progress() as progress:
                return self._loop(stop, progress, None)
        with exclusive(self.out):
            self._refuse_other_run(self.out)
            checkpoint.remove_unfinished(self.out)
            board = self.out / "tensorboard" if self._tensorboard else None
            log = MetricsLog(self.out / METRICS, self.step, tensorboard=board)
            try:
                with GracefulStop() as stop, self._progress() as progress:
                    return self._loop(stop, progress, log)
            finally:
                log.close()

    def _loop(self, stop: GracefulStop, progress: TrainingProgress, log: MetricsLog | None) -> TrainResult:
        config = self.config
        stopped = "finished"
        if self.step == 0 and config.eval_every:
            self._evaluate(progress, log)
        while self.step < config.steps:
            result = self.train_step()
            last = self.step == config.steps
            if log is not None:
                log.write(dataclasses.asdict(result))
            progress.update(self.step, result.loss, result.tokens, result.seconds)
            if last or _due(self.step, config.eval_every):
                self._evaluate(progress, log)
            if last or _due(self.step, config.sample_every):
                self._sample(progress, log)
            is_best = self.best is not None and self.best[1] == self.step
            if self.out is not None and (last or is_best or _due(self.step, config.save_every)):
                self.save()
            if config.patience is not None and self._bad_evaluations >= config.patience and not last:
                stopped = "early"
                progress.say(f"no better validation loss in {self._bad_evaluations} evaluations: stopping early")
                break
            if stop.requested and not last:
                stopped = "interrupted"
                break
        saved = None if self.out is None else self.save()
        if self.out is not None:
            self.plot()
        return TrainResult(self.step, stopped, self.evaluation, saved, self.seconds)

    def train_step(self) -> StepResult:
        """One optimizer step: forward and backward over each micro-batch, clipping, AdamW.

        The loss of a micro-batch is a sum over its tokens, and AdamW divides the gradients by the tokens of the whole
        batch, so that however the batch is cut, the gradient is that of the mean loss over the batch.

        Raises:
            FloatingPointError: the loss or the gradient is not finite. Without max_grad_norm the latter shows only when
                the weights in memory are spoilt already; nothing on disk is.
        """
        start = time.perf_counter()
        config, model = self.config, self.model
        device = model.token_embedding.device
        inputs, targets = next(self.loader)
        micro = config.micro_batch_size or config.batch_size
        total = int((targets != IGNORE_INDEX).sum())
        model.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for some_inputs, some_targets in zip(inputs.split(micro), targets.split(micro), strict=True):
            loss = model(some_inputs.to(device), some_targets.to(device), reduction="sum", ignore_index=IGNORE_INDEX)
            loss.backward()
            loss_sum += loss.detach()
        loss = loss_sum.item() / total
        self._refuse_non_finite("loss", loss)
        lr = config.learning_rate(self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step(grad_scale=total)
        norm = float(self.optimizer.grad_norm)  # type: ignore[arg-type]  # None only before the first step
        self._refuse_non_finite("gradient norm", norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.evaluation = None
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return StepResult(self.step, loss, norm, lr, targets.numel(), seconds)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        """The loss on the validation tokens, in order, at most config.eval_tokens of them.

        Raises:
            ValueError: there are no validation tokens.
        """
        if self.validation_tokens is None:
            raise ValueError("Trainer: there are no validation tokens to evaluate on")
        device = self.model.token_embedding.device
        rows = self.config.micro_batch_size or self.config.batch_size
        limit = self.config.eval_tokens or len(self.validation_tokens)
        nats, tokens, text_bytes = 0.0, 0, 0
        self.model.eval()
        for inputs, targets in sequential_batches(self.validation_tokens, rows, self.context):
            keep = max(1, min(len(inputs), (limit - tokens) // self.context))  # whole windows, one at least
            inputs, targets = inputs[:keep], targets[:keep]
            losses = self.model(inputs.to(device), targets.to(device), reduction="none")
            nats += losses.double().sum().item()
            tokens += targets.numel()
            if self._bytes_of is not None:
                text_bytes += int(self._bytes_of[targets].sum())
            if tokens + self.context > limit:
                break
        return Evaluation(nats / tokens, nats / text_bytes if text_bytes else None, tokens)

    def sample(self) -> str:
        """Text that the model writes now, after config.sample_prompt."""
        if self.tokenizer is None:
            raise ValueError("Trainer: samples need a tokenizer")
        (result,) = generate(
            self.model,
            [self.config.sample_prompt],
            self.config.sample_tokens,
            temperature=0.8,
            seed=self.config.seed,
            tokenizer=self.tokenizer,
        )
        return self.config.sample_prompt + (result.text or "")

    # --- what is kept ---

    def save(self) -> Path:
        """Writes the checkpoint of this step (once) and deletes those that ``keep`` no longer covers.

        Raises:
            ValueError: the trainer has no ``out``.
        """
        if self.out is None:
            raise ValueError("Trainer: there is no out, the folder to save into")
        path = checkpoint.checkpoint_path(self.out, self.step)
        if self._saved == self.step:
            return path
        checkpoint.save_checkpoint(
            path, self.model, tokenizer=self.tokenizer, optimizer=self.optimizer, trainer=self._state()
        )
        self._saved = self.step
        for old in checkpoint.list_checkpoints(self.out)[: -self.config.keep]:
            if self.best is None or checkpoint.step_of(old) != self.best[1]:
                checkpoint.remove_checkpoint(old)
        return path

    def resume(self, path: str | os.PathLike[str] | None = None) -> list[str]:
        """Continues from a checkpoint, by default the last one of ``out``; bit for bit where nothing else has changed.

        Returns:
            What has changed since, a sentence each: settings of the config, versions, threads, operators.

        Raises:
            FileNotFoundError: there is no checkpoint with training state.
            ValueError: the checkpoint is damaged, or of another model, dtype or data (says what differs).
        """
        if path is None and self.out is None:
            raise ValueError("Trainer: resume needs the path of a checkpoint or of a run, since there is no out")
        folder = checkpoint.find_checkpoint(self.out if path is None else path)  # type: ignore[arg-type]
        state = checkpoint.load_checkpoint(folder, self.model, self.optimizer)
        self.loader.load_state_dict(state["loader"])
        _set_random_state(state["random"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.best = None if state["best"] is None else tuple(state["best"])
        self._bad_evaluations = state["bad_evaluations"]
        self.evaluation = None if state["evaluation"] is None else Evaluation(**state["evaluation"])
        if self.out is not None and folder == checkpoint.checkpoint_path(self.out, self.step):
            self._saved = self.step
        return _changes(state["config"] | state["made_with"], _config_json(self.config) | _made_with(self.model))

    def plot(self) -> Path:
        """Draws the losses of metrics.jsonl so far; returns the picture's path."""
        if self.out is None:
            raise ValueError("Trainer: there is no out, the folder to draw into")
        path = self.out / CURVE
        step_tokens = self.config.batch_size * self.context
        title = f"{self.model.num_parameters():,} parameters, {self.step:,} steps of {step_tokens:,} tokens"
        plot_losses(path, read_metrics(self.out / METRICS), unigram=self.unigram_entropy, title=title)
        return path

    @cached_property
    def unigram_entropy(self) -> float:
        """The entropy of the training tokens one by one, in nats: the best that a model without context could do."""
        return unigram_entropy(self.train_tokens.tokens, self.train_tokens.vocab_size)

    def _state(self) -> dict[str, Any]:
        evaluation = self.evaluation
        return {
            "step": self.step,
            "seconds": self.seconds,
            "validation_loss": None if evaluation is None else evaluation.validation_loss,
            "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
            "best": self.best,
            "bad_evaluations": self._bad_evaluations,
            "loader": self.loader.state_dict(),
            "random": _random_state(),
            "config": _config_json(self.config),
            "made_with": _made_with(self.model),
        }

    # --- parts of the loop ---

    def _progress(self) -> TrainingProgress:
        return TrainingProgress(self.console, self.config.steps, self.step, self.config.log_every)

    def _evaluate(self, progress: TrainingProgress, log: MetricsLog | None) -> None:
        if self.validation_tokens is None:
            return
        evaluation = self.evaluation = self.evaluate()
        loss = evaluation.validation_loss
        self._refuse_non_finite("validation loss", loss)
        if self.best is None or loss < self.best[0]:
            self.best = (loss, self.step)
            self._bad_evaluations = 0
        else:
            self._bad_evaluations += 1
        progress.say(f"step {self.step}: {evaluation}")
        if log is not None:
            numbers = {"perplexity": evaluation.perplexity, "bits_per_byte": evaluation.bits_per_byte}
            log.write({"step": self.step, **dataclasses.asdict(evaluation), **numbers})

    def _sample(self, progress: TrainingProgress, log: MetricsLog | None) -> None:
        if not self.config.sample_every:
            return
        text = self.sample()
        progress.say(f"step {self.step}, a sample:\n{text}\n")
        if log is not None:
            log.write({"step": self.step, "sample": text})

    @cached_property
    def _bytes_of(self) -> Tensor | None:
        """(V,) the bytes of text that each id stands for; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        special = set(self.tokenizer.special_tokens.values())
        sizes = [0 if id in special else _size(self.tokenizer, id) for id in range(self.tokenizer.vocab_size)]
        return torch.from_numpy(np.array(sizes, dtype=np.int64))

    def _refuse_non_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = "nothing was saved yet"
        if self.out is not None and (checkpoints := checkpoint.list_checkpoints(self.out)):
            kept = f"the last good checkpoint is {checkpoints[-1]}"
        lr = self.config.learning_rate(self.step + 1)
        raise FloatingPointError(
            f"the {name} became {value} at step {self.step + 1} (learning rate {lr:.3g}); {kept}. "
            "A lower lr, a longer warm-up or a smaller max_grad_norm usually helps"
        )

    def _refuse_other_run(self, out: Path) -> None:
        later = [path for path in checkpoint.list_checkpoints(out) if checkpoint.step_of(path) > self.step]
        if later:
            raise FileExistsError(
                f"{out} holds a run that has come to step {checkpoint.step_of(later[-1])}, and this one is at "
                f"step {self.step}: resume it from its last checkpoint, choose another folder, or delete that run first"
            )


def _check_data(
    model: GPT,
    config: TrainConfig,
    train: TokenFile,
    validation: TokenFile | None,
    tokenizer: Tokenizer | None,
    context: int,
) -> None:
    if context > model.config.context:
        raise ValueError(
            f"TrainConfig: context={context} must be at most the model's context of {model.config.context}"
        )
    for name, tokens in (("train", train), ("validation", validation)):
        if tokens is None:
            continue
        if tokens.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"Trainer: the {name} tokens have a vocabulary of {tokens.vocab_size}, "
                f"the model one of {model.config.vocab_size}"
            )
        if tokenizer is not None:
            tokens.check_tokenizer(tokenizer)
        if len(tokens) < context + 1:
            raise ValueError(
                f"Trainer: there are {len(tokens):,} {name} tokens, but a context of {context} needs at least "
                f"{context + 1}: take more text or a shorter context"
            )
    windows = (len(train) - 1) // context
    if config.batch_size > windows:
        raise ValueError(
            f"TrainConfig: batch_size={config.batch_size} must be at most {windows}: "
            f"the {len(train):,} training tokens make no more sequences of {context}"
        )
    if config.sample_every and tokenizer is None:
        raise ValueError(f"TrainConfig: sample_every={config.sample_every} needs a tokenizer")
    if config.patience is not None and (validation is None or not config.eval_every):
        raise ValueError(f"TrainConfig: patience={config.patience} needs validation tokens and eval_every above 0")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _size(tokenizer: Tokenizer, id: int) -> int:
    try:
        return len(tokenizer.token_bytes(id))
    except ValueError:  # an id that is not in use
        return 0


def _config_json(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config) | {"betas": list(config.betas)}


def _made_with(model: GPT) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings."""
    return {
        "fastgpt version": fastgpt.__version__,
        "torch version": torch.__version__,
        "Python version": platform.python_version(),
        "number of threads": torch.get_num_threads(),
        "CPU kernels": _C.cpu.isa(),
        "ops": model.ops.spec,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r} and is now {now[name]!r}" for name in now if before.get(name) != now[name]
    ]


def _random_state() -> dict[str, Any]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    for name, encoded in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)
