"""What a training run leaves for reading: metrics.jsonl, TensorBoard's event files, the picture of the loss curve."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.files import atomic_write


class MetricsLog:
    """A JSON lines file of records that each hold a "step", and the same numbers for TensorBoard if asked.

    Each line is handed to the system at once, so that a killed run has lost none. On resuming, the lines of steps
    that will be taken again, and a last line that was cut off, are dropped first: no step comes twice.

    Args:
        path: the file; continued if it exists.
        step: the step from which the run goes on; records of later steps are dropped.
        tensorboard: a folder for TensorBoard's event files.

    Raises:
        ImportError: ``tensorboard`` is given but not installed.
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], step: int = 0, *, tensorboard: str | os.PathLike[str] | None = None
    ) -> None:
        self.path = Path(path)
        self._board: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "TensorBoard is not installed: pip install tensorboard, or train without --tensorboard"
                ) from error
            self._board = SummaryWriter(os.fspath(tensorboard), purge_step=step + 1)
        kept = [record for record in read_metrics(self.path) if step > 0 and record["step"] <= step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; its numbers go to TensorBoard under their names."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, record["step"])
                elif isinstance(value, str):
                    self._board.add_text(name, value, record["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file; none if it does not exist. A last line that was cut off is left out.

    Raises:
        ValueError: another line is not a JSON object with a step (names file and line).
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number} is not a record of metrics: {line[:60]!r}") from error
        records.append(record)
    return records


def unigram_entropy(tokens: np.ndarray, vocab_size: int) -> float:
    """-sum p ln p over the frequencies p of the tokens, in nats: what a model of single tokens could reach at best."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), 1 << 24):  # tokens may be a mapped file larger than memory
        counts += np.bincount(tokens[start : start + (1 << 24)], minlength=vocab_size)
    p = counts[counts > 0] / len(tokens)
    return float(-(p * np.log(p)).sum())


def smooth(values: Sequence[float], span: int) -> list[float]:
    """The exponential moving average with weight 2 / (span + 1), free of the start's bias."""
    keep, average, weight, result = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def plot_losses(
    path: str | os.PathLike[str],
    records: Iterable[Mapping[str, Any]],
    *,
    unigram: float | None = None,
    title: str = "",
) -> None:
    """Draws training and validation loss over the steps as a PNG, atomically.

    Args:
        records: as in metrics.jsonl: a "loss" is a training step's, a "validation_loss" an evaluation's.
        unigram: drawn as a line to compare with; in nats per token, as the losses are.
    """
    from matplotlib.figure import Figure  # slow to import, and needed only here

    records = list(records)
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if training:
        steps, losses = zip(*training, strict=True)
        span = max(1, len(losses) // 50)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(losses, span), color="tab:blue", label="training" + (" (smoothed)" if span > 1 else ""))
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(
            steps, losses, color="tab:orange", marker="o", markersize=3, label=f"validation, {losses[-1]:.3f} last"
        )
    if unigram is not None:
        axes.axhline(unigram, color="gray", linestyle="--", label=f"entropy of single tokens, {unigram:.3f}")
    finite = [loss for _, loss in training + validation if math.isfinite(loss)]
    if finite:
        axes.set_ylim(bottom=0.95 * min([*finite, *([unigram] if unigram else [])]))
        axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, format="png", dpi=120)
