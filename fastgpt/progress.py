"""What a person sees while a model trains: a live bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

_RECENT = 50  # steps over which speed is measured


class TrainingProgress:
    """Shows step, loss, tokens a second and time left; a context manager.

    Args:
        console: where to write; a bar if it is a terminal, otherwise a line every ``log_every`` steps.
        steps: how many there will be.
        step: how many there have been.
        log_every: between two lines.
    """

    def __init__(self, console: Console, steps: int, step: int, log_every: int) -> None:
        self._console = console
        self._steps = steps
        self._log_every = log_every
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)  # seconds and tokens of each step
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task("training", total=steps, completed=step, status="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Notes that training step ``step`` is done."""
        self._recent.append((seconds, tokens))
        status = f"loss {loss:.6f}  {self.tokens_per_second:,.0f} tokens/s  {_duration(self._seconds_left(step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif step % self._log_every == 0 or step in (1, self._steps):
            self.say(f"step {step:{len(str(self._steps))}}/{self._steps}  {status}")

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one. The text is taken as it is: no markup."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps."""
        return sum(tokens for _, tokens in self._recent) / max(sum(seconds for seconds, _ in self._recent), 1e-9)

    def _seconds_left(self, step: int) -> float:
        return (self._steps - step) * sum(seconds for seconds, _ in self._recent) / len(self._recent)


def printable(text: str) -> str:
    """``text`` with U+FFFD for control characters, line ends and tabs apart: a model may write escape sequences."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)


def _duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
