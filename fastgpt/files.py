"""Writing files so that a reader sees the old file or the whole new one, never half of either."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, binary: bool = False) -> Iterator[IO[Any]]:
    """Opens a new file that takes the name ``path`` only once it is complete and on the disk.

    The file is written under a temporary name in the same folder (created if missing), flushed with fsync and
    renamed over ``path``; then the folder is flushed too, so that the rename survives a power cut. If the block
    raises (a full disk, Ctrl-C), the temporary file is removed and whatever stood at ``path`` stays as it was.

    Raises:
        OSError: the folder or file cannot be written; names ``path`` even where the system does not.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x+b") if binary else open(temporary, "x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Opens a new folder that takes the name ``path`` only once all the files in it are complete and on the disk.

    As ``atomic_write``, for a folder of files (without sub-folders). A folder at ``path`` is replaced; since no file
    system renames one over another, it is first set aside as ``path`` + ".previous", and deleted when the new one is in
    its place. Killed between the two renames, that is where it is.

    Raises:
        OSError: the folder cannot be written; names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    aside = path.with_name(f"{path.name}.previous")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        try:
            os.rename(temporary, path)
        except OSError:
            if aside.exists():
                os.rename(aside, path)
            raise
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and str(error.filename or temporary).startswith(str(temporary)):
            error.filename = str(path) + str(error.filename or temporary).removeprefix(str(temporary))
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file; ValueError names the file and the place where it stops being JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
