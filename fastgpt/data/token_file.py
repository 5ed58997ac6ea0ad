"""Token files: a corpus as one array of ids on disk, mapped into memory rather than read.

``corpus.bin`` is the bare ids, uint16 or uint32, little-endian, each document closed by the end-of-text id.
``corpus.bin.json`` beside it says what they are: dtype, count, vocabulary size, SHA-256, the tokenizer, and where the
validation documents begin. The ids are written first, the description last: what has no description is not whole.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastgpt.files import atomic_write, read_json, write_json
from fastgpt.tokenizers import Tokenizer

_FORMAT = "fastgpt tokens 1"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_BATCH = 1 << 20  # characters encoded at a time: enough to keep every thread busy, little enough to hold


def encode_documents(documents: Iterable[str | bytes], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each document, closed by the end-of-text id."""
    for batch in _batches(documents):
        for ids in tokenizer.encode_batch(batch):
            yield [*ids, tokenizer.eos_id]


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[Sequence[int] | np.ndarray],
    vocab_size: int,
    tokenizer_info: Mapping[str, Any] | None = None,
    *,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> TokenFile:
    """Writes the ids of ``documents`` as a token file, atomically, a document at a time.

    Args:
        path: the file to write; its description becomes ``path`` + ".json".
        documents: the ids of each document, as ``encode_documents`` gives them.
        vocab_size: every id must be below it.
        tokenizer_info: ``Tokenizer.describe()``, kept in the description.
        validation_fraction: the share of the tokens, in [0, 1), to set aside for validation, in whole documents
            drawn at random. They stand behind the others, and ``TokenFile.split`` parts them again.
        seed: of that draw; the same seed and documents give the same file.

    Raises:
        ValueError: ``vocab_size`` or ``validation_fraction`` out of range, an id outside the vocabulary (names the
            document), no ids at all, or a side of the split without documents.
        OSError: the file cannot be written; what stood there before is left alone.
    """
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size must be from 1 to 2**32, not {vocab_size}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), not {validation_fraction}")
    path = Path(path)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    draw = random.Random(seed)
    with atomic_write(path, binary=True) as file, tempfile.TemporaryFile(dir=path.parent) as validation:
        number = 0
        for number, ids in enumerate(documents, start=1):
            data = _as_bytes(ids, vocab_size, _DTYPES[dtype], number)
            # What validation lacks, if this document is counted too, makes the chance: it cannot drift off its share.
            lacking = validation_fraction * (file.tell() + validation.tell() + len(data)) - validation.tell()
            side = validation if draw.random() * len(data) < lacking else file
            side.write(data)
        train_size = file.tell()
        if train_size + validation.tell() == 0:
            raise ValueError(f"there are no tokens to write to {path}")
        if validation_fraction and not (train_size and validation.tell()):
            raise ValueError(
                f"a validation_fraction of {validation_fraction} and seed {seed} put all of the {number} documents "
                "on one side: take more documents, another seed, or cut off the tail with TokenFile.split"
            )
        validation.seek(0)
        shutil.copyfileobj(validation, file)
        itemsize = _DTYPES[dtype].itemsize
        description = {
            "format": _FORMAT,
            "dtype": dtype,
            "count": file.tell() // itemsize,
            "train_count": train_size // itemsize,
            "vocab_size": vocab_size,
            "sha256": _sha256(file),
            "tokenizer": dict(tokenizer_info) if tokenizer_info else None,
        }
        os.fsync(file.fileno())  # a full disk shows here at the latest, while the old file is whole
        _description_path(path).unlink(missing_ok=True)  # it must never stand beside ids that it does not describe
    write_json(_description_path(path), description)
    return TokenFile(path)


class TokenFile:
    """A token file, mapped into memory, or a contiguous part of one.

    Attributes:
        path: the file.
        tokens: (N,) uint16 or uint32, read-only.
        start: where ``tokens`` begins in the file.
        vocab_size: every id is below it.
        tokenizer_info: ``Tokenizer.describe()`` of the tokenizer that wrote it, or None.
        sha256: the hash of the whole file, as written.

    Raises:
        FileNotFoundError: there is no such file, or its description is missing (writing was cut short).
        ValueError: the description is not one, or the file is not as long as it says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        if not _description_path(self.path).is_file():
            raise FileNotFoundError(
                f"{self.path} has no description {_description_path(self.path).name}: "
                "it is no token file, or writing it was cut short; write it again"
            )
        description = _read_description(self.path)
        dtype = _DTYPES[description["dtype"]]
        count = description["count"]
        if size != count * dtype.itemsize:
            raise ValueError(
                f"{self.path} is truncated or corrupt: {size} bytes instead of {count * dtype.itemsize} "
                f"({count} ids of {dtype.itemsize} bytes); write it again"
            )
        self.start = 0
        self.vocab_size: int = description["vocab_size"]
        self.tokenizer_info: dict[str, Any] | None = description["tokenizer"]
        self.sha256: str = description["sha256"]
        self._train_count: int = description["train_count"]
        self.tokens: np.ndarray = np.memmap(self.path, dtype=dtype, mode="r", shape=(count,))

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        part = f"{self.start}:{self.start + len(self)}"
        return f"TokenFile({str(self.path)!r}, tokens {part}, vocab_size={self.vocab_size})"

    @property
    def has_validation(self) -> bool:
        """Whether ``write_tokens`` set documents aside for validation, so that ``split`` needs no fraction."""
        return self._train_count < len(self)

    def split(self, validation_fraction: float | None = None) -> tuple[TokenFile, TokenFile]:
        """The training part and the validation part, both views of this file.

        Args:
            validation_fraction: how much of the tail is for validation, in (0, 1), wherever documents begin. By
                default the parts are the documents that ``write_tokens`` set aside, and the others.

        Raises:
            ValueError: the fraction is out of range or leaves a part empty; or none is given and the file was
                written without setting documents aside.
        """
        if validation_fraction is None:
            cut = self._train_count
            if cut == len(self):
                raise ValueError(f"{self} was written without validation documents: pass a validation_fraction")
        else:
            if not 0 < validation_fraction < 1:
                raise ValueError(f"validation_fraction must be in (0, 1), not {validation_fraction}")
            cut = len(self) - round(len(self) * validation_fraction)
            if not 0 < cut < len(self):
                raise ValueError(f"a validation_fraction of {validation_fraction} leaves a part of {self} empty")
        return self._part(0, cut), self._part(cut, len(self))

    def verify(self) -> None:
        """Reads the whole file; ValueError if it is not, byte for byte, what was written."""
        with open(self.path, "rb") as file:
            digest = _sha256(file)
        if digest != self.sha256:
            raise ValueError(f"{self.path} is corrupt: its SHA-256 is {digest}, not {self.sha256}; write it again")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """ValueError unless the ids were written with ``tokenizer``, or with one that decodes alike."""
        info = self.tokenizer_info
        if info is not None and info.get("fingerprint") != tokenizer.fingerprint:
            raise ValueError(
                f"{self.path} was written with another tokenizer: {info.get('kind')} of {info.get('vocab_size')} ids, "
                f"not this {tokenizer.kind} of {tokenizer.vocab_size} ids"
            )

    def _part(self, start: int, stop: int) -> TokenFile:
        part = copy.copy(self)
        part.tokens = self.tokens[start:stop]
        part.start = self.start + start
        part._train_count = len(part)
        return part


def _batches(documents: Iterable[str | bytes]) -> Iterator[list[str | bytes]]:
    batch: list[str | bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _as_bytes(ids: Sequence[int] | np.ndarray, vocab_size: int, dtype: np.dtype, document: int) -> bytes:
    array = np.asarray(ids)
    if array.size == 0:
        return b""
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"document {document}: ids must be one row of integers, not {array.dtype} {array.shape}")
    low, high = array.min(), array.max()
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"document {document}: id {wrong} is outside the vocabulary of {vocab_size} ids")
    return array.astype(dtype).tobytes()


def _description_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_description(path: Path) -> dict[str, Any]:
    """The checked description of the token file ``path``."""
    where = _description_path(path)
    value = read_json(where)
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise ValueError(f"{where} does not describe a token file: it has no format {_FORMAT!r}")
    allowed = {
        "dtype": lambda v: isinstance(v, str) and v in _DTYPES,
        "count": lambda v: type(v) is int and v > 0,
        "train_count": lambda v: type(v) is int and 0 < v <= value["count"],
        "vocab_size": lambda v: type(v) is int and v > 0,
        "sha256": lambda v: isinstance(v, str),
        "tokenizer": lambda v: v is None or isinstance(v, dict),
    }
    for name, is_allowed in allowed.items():
        if not is_allowed(value.get(name)):
            raise ValueError(f"{where}: {name} cannot be {value.get(name)!r}")
    return value


def _sha256(file: IO[bytes]) -> str:
    """The hash of a file from its first byte."""
    file.flush()
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
