"""Reading documents: files, folders, globs, gzip, JSON lines and stdin become one string a document."""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

Errors = Literal["strict", "replace", "ignore", "surrogateescape"]

STDIN = "-"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")

_CHUNK = 1 << 20  # bytes read at a time
_BYTE_ORDER_MARK = "\ufeff"


def read_documents(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    separator: str | None = None,
    errors: Errors = "strict",
) -> Iterator[str]:
    """Iterates over the documents of ``sources``, in their order.

    A text file is one document, or as many as ``separator`` cuts it into (such a file may be larger than memory).
    A JSON lines file (.jsonl, .ndjson) is one document a line. What ends in .gz is decompressed. Line ends stay as
    they are, a byte order mark at the start of a file is dropped, and documents without text are passed over.

    Args:
        sources: one or more of: a file; a folder, for all .txt, .text, .md, .rst, .jsonl and .ndjson (and .gz of
            these) in it and its sub-folders, sorted, but for names that begin with a dot; a glob ("books/**/*.txt");
            "-" for stdin, as a text file. A file that is reached twice is read once.
        text_field: the field of a JSON lines record that holds the text.
        separator: what stands between the documents of a text file, such as "<|endoftext|>".
        errors: what becomes of bytes that are not UTF-8: "strict" refuses them; the others are Python's.

    Raises:
        FileNotFoundError: a source does not exist or matches no file (at once, before anything is read).
        ValueError: there is no source or an empty separator (at once); a file named by itself has no text, or no
            file has any; bytes that are not UTF-8 (names file and byte offset), a bad JSON record (names file and
            line), a corrupt or truncated gzip file.
    """
    if separator == "":
        raise ValueError("separator must not be empty")
    names = [os.fspath(s) for s in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    if not names:
        raise ValueError("sources is empty: name at least one file, folder or glob, or '-' for stdin")
    found: dict[str, str] = {}  # the name to show, by real path
    for name in names:
        for file in _files(name):
            found.setdefault(file if file == STDIN else os.path.realpath(file), file)
    return _read(list(found.values()), names, text_field, separator, errors)


def _read(
    files: list[str], sources: list[str], text_field: str, separator: str | None, errors: Errors
) -> Iterator[str]:
    total = 0
    for name in files:
        count = 0
        with _open(name) as stream:
            if _suffix(name) in JSONL_SUFFIXES:
                documents = _json_documents(stream, name, text_field, errors)
            else:
                documents = _text_documents(stream, name, separator, errors)
            for document in documents:
                if document and not document.isspace():
                    count += 1
                    yield document
        if count == 0 and name in sources:
            raise ValueError(f"{_shown(name)} holds no text")
        total += count
    if total == 0:
        raise ValueError(f"there is no text in {', '.join(sources)}: {len(files)} files without any")


def _files(source: str) -> list[str]:
    """The files that ``source`` means, sorted."""
    if source == STDIN or (os.path.exists(source) and not os.path.isdir(source)):
        return [source]
    if os.path.isdir(source):
        files = list(_text_files_in(source))
        endings = ", ".join(TEXT_SUFFIXES + JSONL_SUFFIXES)
        problem = f"no file in the folder {source} ends in {endings}, or in one of these and .gz"
    else:
        files = [file for file in glob.glob(source, recursive=True) if not os.path.isdir(file)]
        problem = f"no file matches {source!r}" if glob.has_magic(source) else f"no file or folder {source!r}"
    if not files:
        raise FileNotFoundError(problem)
    return sorted(files)


def _text_files_in(folder: str) -> Iterator[str]:
    for path, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _suffix(name) in TEXT_SUFFIXES + JSONL_SUFFIXES:
                yield os.path.join(path, name)


def _suffix(name: str) -> str:
    """The ending that tells the format, .gz apart."""
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def _shown(name: str) -> str:
    return "stdin" if name == STDIN else name


@contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    if name == STDIN:
        yield sys.stdin.buffer
    elif name.lower().endswith(".gz"):
        try:
            with gzip.open(name, "rb") as stream:
                yield stream  # type: ignore[misc]  # GzipFile reads like any binary file
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{name} is not a whole gzip file: {error}") from error
    else:
        with open(name, "rb") as stream:
            yield stream


def _text_documents(stream: BinaryIO, name: str, separator: str | None, errors: Errors) -> Iterator[str]:
    pieces = _decoded(stream, name, errors)
    if separator is None:
        yield "".join(pieces)
        return
    rest = ""
    for piece in pieces:
        *documents, rest = (rest + piece).split(separator)
        yield from documents
    yield rest


def _decoded(stream: BinaryIO, name: str, errors: Errors) -> Iterator[str]:
    """The text of ``stream``, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    while chunk := stream.read(_CHUNK):
        pending = len(decoder.getstate()[0])  # the start of a character that the last chunk ended in
        with _utf8_errors(name, offset - pending):
            text = decoder.decode(chunk)
        yield text.removeprefix(_BYTE_ORDER_MARK) if offset == 0 else text
        offset += len(chunk)
    with _utf8_errors(name, offset - len(decoder.getstate()[0])):
        yield decoder.decode(b"", final=True)


def _json_documents(stream: BinaryIO, name: str, text_field: str, errors: Errors) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        with _utf8_errors(name, offset):
            text = line.decode("utf-8", errors).removeprefix(_BYTE_ORDER_MARK)
        if text and not text.isspace():
            try:
                yield _text_of_record(text, text_field, errors)
            except ValueError as error:
                raise ValueError(f"{_shown(name)}, line {number}: {error}") from error
        offset += len(line)


def _text_of_record(line: str, text_field: str, errors: Errors) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not a JSON record: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, not a {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"the record has no field {text_field!r}; its fields are {sorted(record)}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"the field {text_field!r} must be a string, not a {type(text).__name__}")
    try:  # an escape such as \ud800 is valid JSON but no character
        text.encode("utf-8", "surrogateescape" if errors == "surrogateescape" else "strict")
    except UnicodeEncodeError as error:
        raise ValueError(f"the field {text_field!r} holds half a surrogate pair: {error}") from error
    return text


@contextmanager
def _utf8_errors(name: str, start: int) -> Iterator[None]:
    """Says where in the file a decoding error is; the bytes being decoded begin at offset ``start``."""
    try:
        yield
    except UnicodeDecodeError as error:
        offset = start + error.start
        raise ValueError(
            f"{_shown(name)} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset} "
            f"({error.reason}); convert the file, or pass errors='replace'"
        ) from error
