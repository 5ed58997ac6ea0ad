"""How commands fail: one line that says what is wrong, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns a bad value or file (ValueError, OSError) into ``error: ...`` on stderr and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # `| head`: the reader has seen enough, and click ends quietly
        raise
    except (ValueError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
