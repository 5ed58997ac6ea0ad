"""Stopping a long job so that nothing is lost, and keeping two of them out of one folder."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class GracefulStop:
    """Inside this context, the first SIGINT (Ctrl-C) or SIGTERM only sets ``requested``; the second acts as ever.

    Only the main thread receives signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # a job in the background of a script ignores Ctrl-C
                    self._before[number] = signal.signal(number, self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        # Not through print: the signal may have come in the middle of one, which is not reentrant.
        os.write(2, b"\nStopping after this step, then saving. Once more to stop at once.\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds ``folder`` (created if missing) for this process alone; the system lets go of it however the process ends.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is training in this folder", str(folder)) from error
        yield
