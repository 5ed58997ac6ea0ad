"""Batches of windows from a token file: shuffled and endless for training, in order and once for validation.

Legend: N tokens, B batch size, T context. A window is T + 1 consecutive tokens: inputs are the first T, targets the
last T. Windows overlap by that one token, so every token but the first is predicted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fastgpt.data.token_file import TokenFile

Batch = tuple[torch.Tensor, torch.Tensor]


class BatchLoader:
    """An endless iterator over shuffled batches: (inputs, targets), each (B, T) int64.

    An epoch is every window once, in an order drawn from (seed, epoch); its windows begin at an offset drawn from the
    same, so that later epochs cut the text elsewhere. Batches are always full: where an epoch ends inside a batch,
    the next one fills it. What comes is the same on every machine and does not depend on how often it was resumed.

    With several ranks, each takes its rows of one global batch of ``world_size`` x B rows; all of them see the windows
    that a single rank with that larger batch would see, in the same order.

    Args:
        tokens: the training tokens.
        batch_size: B, rows a batch (on this rank).
        context: T.
        seed: of the order and the offsets.
        rank: this process's number, in [0, world_size).
        world_size: the number of processes.

    Raises:
        ValueError: a size below 1, a rank out of range, fewer than T + 1 tokens; while iterating, an id that is not
            in the vocabulary (a corrupt file).
    """

    def __init__(
        self,
        tokens: TokenFile,
        batch_size: int,
        context: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check(tokens, batch_size, context, rank, world_size)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), not {seed}")
        self.tokens = tokens
        self.batch_size = batch_size
        self.context = context
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._start_epoch(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        starts = self._next_starts(self.batch_size * self.world_size)
        mine = starts[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return _batch(self.tokens, mine, self.context)

    @property
    def epochs(self) -> float:
        """How many times the tokens have been gone through, with the fraction of the epoch at hand."""
        return self._epoch + self._position / len(self._starts)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, in JSON's types: the same on every rank, and good for any batch size."""
        return self._identity() | {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the loader that gave ``state`` would have.

        Raises:
            ValueError: that loader had other tokens, another context or another seed (names what differs).
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"cannot resume the batches: {name} was {state.get(name)!r} and is now {value!r}")
        self._start_epoch(state["epoch"])
        if not 0 <= state["position"] <= len(self._starts):
            raise ValueError(f"cannot resume the batches: position {state['position']} of {len(self._starts)} windows")
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        """What the order of the windows depends on."""
        return {
            "seed": self.seed,
            "context": self.context,
            "sha256": self.tokens.sha256,
            "start": self.tokens.start,
            "count": len(self.tokens),
        }

    def _start_epoch(self, epoch: int) -> None:
        # numpy promises the raw stream of a bit generator for ever, but not what Generator makes of it. So the order
        # is the argsort of raw draws: another numpy resumes the same run.
        raw = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        offsets = min(self.context, len(self.tokens) - self.context)  # each leaves room for one window at least
        offset = int(raw.random_raw()) % offsets
        windows = (len(self.tokens) - 1 - offset) // self.context
        self._starts = offset + self.context * np.argsort(raw.random_raw(windows), kind="stable")
        self._epoch = epoch
        self._position = 0

    def _next_starts(self, count: int) -> np.ndarray:
        """Where the next ``count`` windows begin."""
        taken = []
        while count > 0:
            if self._position == len(self._starts):
                self._start_epoch(self._epoch + 1)
            some = self._starts[self._position : self._position + count]
            self._position += len(some)
            count -= len(some)
            taken.append(some)
        return np.concatenate(taken)


def sequential_batches(
    tokens: TokenFile, batch_size: int, context: int, *, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Every window once, in order, for validation: (inputs, targets), each (B, T) int64, the last with fewer rows.

    Windows begin at the first token; what is left after the last whole one (fewer than T tokens) is not used. Rank r
    of W takes batches r, r + W, r + 2W and so on, so that the ranks together see each window once.

    Raises:
        ValueError: at once, as in ``BatchLoader``.
    """
    _check(tokens, batch_size, context, rank, world_size)
    windows = (len(tokens) - 1) // context
    starts = context * np.arange(windows)
    return (
        _batch(tokens, starts[i : i + batch_size], context)
        for i in range(rank * batch_size, windows, world_size * batch_size)
    )


def _check(tokens: TokenFile, batch_size: int, context: int, rank: int, world_size: int) -> None:
    for name, value in (("batch_size", batch_size), ("context", context), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), not {rank}")
    if len(tokens) < context + 1:
        raise ValueError(
            f"{tokens} holds {len(tokens)} tokens, but a context of {context} needs at least {context + 1}: "
            "take more text or a shorter context"
        )


def _batch(tokens: TokenFile, starts: np.ndarray, context: int) -> Batch:
    ids = tokens.tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64)
    if ids.max() >= tokens.vocab_size:
        raise ValueError(
            f"{tokens.path} is corrupt: it holds id {ids.max()}, outside its vocabulary of {tokens.vocab_size}; "
            "write it again"
        )
    windows = torch.from_numpy(ids)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
