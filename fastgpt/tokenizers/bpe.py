"""Byte-level byte-pair encoding (GPT-2, section 2.2), trained and run by Hugging Face's ``tokenizers``."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastgpt.files import atomic_write
from fastgpt.tokenizers.base import END_OF_TEXT, Tokenizer

FILE_NAME = "tokenizer.json"


def _byte_characters() -> dict[str, int]:
    """The byte that each of GPT-2's 256 stand-in characters means.

    Printable Latin-1 characters mean themselves; the other bytes, in order, are the characters from U+0100 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_of = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(bytes_of.values()))
    return bytes_of | dict(zip(alphabet[len(bytes_of) :], others, strict=True))


BYTE_OF = _byte_characters()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}

# Changed by any normalizer (case, accents, compatibility forms), added prefix space or stripped white space.
_ROUND_TRIP_PROBE = "Don't  \t\r\n\x00 é e\u0301 ﬁ 漢字 🙂 1234\u00a0. "
_SURROGATE = re.compile("[\ud800-\udfff]")


class BPETokenizer(Tokenizer):
    """Byte-level BPE around a ``tokenizers.Tokenizer``.

    Any byte-level tokenizer.json works (GPT-2's, Llama 3's, SmolLM2's) provided that it changes no text.

    Args:
        backend: the Hugging Face tokenizer; this object then owns it.
        eos_token: the special token that ends a document.

    Raises:
        ValueError: the vocabulary is not byte-level, the tokenizer changes text, or ``eos_token`` is not in it.
    """

    kind = "bpe"

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str = END_OF_TEXT) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the base class cuts special tokens out where they are allowed
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        specials = {token.content: id for id, token in added.items() if token.special}
        super().__init__(_table(backend), specials, eos_token)
        for text in (_ROUND_TRIP_PROBE, " " + _ROUND_TRIP_PROBE):
            if (back := self.decode(self.encode(text))) != text:
                raise ValueError(f"this tokenizer changes text: {text!r} comes back as {back!r}")

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        min_frequency: int = 2,
        progress: bool = False,
    ) -> BPETokenizer:
        """Learns the merges from ``documents``; the same documents give the same tokenizer.

        The ids are the 256 bytes, then the merges, then the special tokens. A small corpus may run out of pairs
        to merge: then ``vocab_size`` of the result is smaller than asked.

        Args:
            documents: the texts, read once. Bytes that are not UTF-8 (surrogateescape) are passed over.
            vocab_size: the number of ids to reach, special tokens included; at least 256 plus those.
            special_tokens: their texts; the first ends a document.
            min_frequency: a pair that occurs less often is not merged.
            progress: whether to draw a progress bar on stderr.

        Raises:
            ValueError: ``vocab_size`` or ``min_frequency`` is too small, ``special_tokens`` is empty, repeats itself
                or holds an empty text, or there is no text.
        """
        if not special_tokens or len(set(special_tokens)) < len(special_tokens) or not all(special_tokens):
            raise ValueError(f"special_tokens must be one or more different texts, not {list(special_tokens)!r}")
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes and {len(special_tokens)} special), "
                f"not {vocab_size}"
            )
        if min_frequency < 1:
            raise ValueError(f"min_frequency must be at least 1, not {min_frequency}")
        valid = (part for text in documents for part in _SURROGATE.split(text) if part)
        first = next(valid, None)
        if first is None:
            raise ValueError("there is no text to train a tokenizer on")
        backend = _backend(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special_tokens),
            min_frequency=min_frequency,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=progress,
        )
        backend.train_from_iterator(itertools.chain([first], valid), trainer)
        backend.add_special_tokens(list(special_tokens))
        return cls(backend, eos_token=special_tokens[0])

    @classmethod
    def from_merges(
        cls,
        vocabulary: Mapping[bytes, int],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] = (END_OF_TEXT,),
    ) -> BPETokenizer:
        """Builds the tokenizer from its id for each token and its merges, first merge first.

        The special tokens take the ids after the vocabulary's; the first of them ends a document.
        """
        model = models.BPE(
            vocab={_characters(token): id for token, id in vocabulary.items()},
            merges=[(_characters(left), _characters(right)) for left, right in merges],
        )
        backend = _backend(model)
        backend.add_special_tokens(list(special_tokens))
        return cls(backend, eos_token=special_tokens[0])

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], eos_token: str = END_OF_TEXT) -> BPETokenizer:
        """Reads a Hugging Face tokenizer.json.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no tokenizer.json, or not one of a byte-level tokenizer with that ``eos_token``.
        """
        data = Path(path).read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        try:
            return cls(backend, eos_token)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which ``transformers.AutoTokenizer`` reads as well."""
        with atomic_write(Path(folder) / FILE_NAME) as file:
            file.write(self._backend.to_str(pretty=True))
        super().save(folder)

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"tokenizer_class": "PreTrainedTokenizerFast"}

    def _encode_ordinary(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _backend(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's pipeline: its regular expression cuts text into words, and merges stay within a word."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return backend


def _characters(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def _table(backend: tokenizers.Tokenizer) -> list[bytes | None]:
    """The bytes of each id."""
    added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
    vocabulary = {id: token for token, id in backend.get_vocab(with_added_tokens=False).items()}
    table: list[bytes | None] = [None] * (max(vocabulary | added, default=-1) + 1)
    for id, token in vocabulary.items():
        if id not in added:
            if foreign := set(token) - BYTE_OF.keys():
                raise ValueError(f"the vocabulary is not byte-level: token {token!r} holds {sorted(foreign)[0]!r}")
            table[id] = bytes(BYTE_OF[character] for character in token)
    for id, content in added.items():
        table[id] = content.encode("utf-8")
    return table
