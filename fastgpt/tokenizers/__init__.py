"""Tokenizers: raw bytes, byte-level BPE and GPT-2's BPE behind one interface.

tokenizer = make_tokenizer("bytes")
ids = tokenizer.encode("Hello")
tokenizer.save("run/")
load_tokenizer("run/").decode(ids)
"""

from __future__ import annotations

import os
from pathlib import Path

from fastgpt.files import read_json
from fastgpt.tokenizers.base import CONFIG_NAME, END_OF_TEXT, IncrementalDecoder, Tokenizer
from fastgpt.tokenizers.bpe import FILE_NAME, BPETokenizer
from fastgpt.tokenizers.byte import ByteTokenizer
from fastgpt.tokenizers.gpt2 import find_gpt2_ranks, gpt2_tokenizer, tokenizer_from_ranks

__all__ = [
    "END_OF_TEXT",
    "BPETokenizer",
    "ByteTokenizer",
    "IncrementalDecoder",
    "Tokenizer",
    "find_gpt2_ranks",
    "gpt2_tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "tokenizer_from_ranks",
]


def make_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer called ``name``: "bytes", "gpt2", or the path of a folder or a tokenizer.json.

    Raises:
        FileNotFoundError: no such tokenizer; or "gpt2" whose ranks are not at hand (says how to get them).
        ValueError: what lies at the path is not a byte-level tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2_tokenizer()
    path = Path(name)
    if path.is_dir():
        return load_tokenizer(path)
    if path.is_file():
        return BPETokenizer.from_file(path)
    raise FileNotFoundError(
        f"no tokenizer {str(name)!r}: it must be 'bytes', 'gpt2', a folder that holds a tokenizer, "
        "or the path of a tokenizer.json"
    )


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Restores what ``Tokenizer.save`` wrote into ``folder``, or a byte-level tokenizer saved by ``transformers``.

    Raises:
        FileNotFoundError: there is no tokenizer in ``folder``.
        ValueError: its files are corrupt, or it is not a byte-level tokenizer.
    """
    config_path, file_path = Path(folder) / CONFIG_NAME, Path(folder) / FILE_NAME
    if not config_path.is_file() and not file_path.is_file():
        raise FileNotFoundError(f"no tokenizer in {folder}: neither {CONFIG_NAME} nor {FILE_NAME} is there")
    config = read_json(config_path) if config_path.is_file() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} must hold a JSON object, not a {type(config).__name__}")
    kind = config.get("fastgpt_kind", BPETokenizer.kind)
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind != BPETokenizer.kind:
        raise ValueError(f"{config_path}: fastgpt_kind must be 'bytes' or 'bpe', not {kind!r}")
    return BPETokenizer.from_file(file_path, eos_token=_eos_token(config))


def _eos_token(config: dict) -> str:
    """transformers writes it as a string or as an object with its text under "content"."""
    eos_token = config.get("eos_token")
    if isinstance(eos_token, dict):
        eos_token = eos_token.get("content")
    return eos_token if isinstance(eos_token, str) else END_OF_TEXT
