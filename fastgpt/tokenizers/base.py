"""The interface of every tokenizer, and the decoding of a stream of ids."""

from __future__ import annotations

import codecs
import hashlib
import operator
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from fastgpt.files import write_json

END_OF_TEXT = "<|endoftext|>"
CONFIG_NAME = "tokenizer_config.json"

# Python's "surrogateescape" error handler turns each byte that is not UTF-8 (0x80..0xff) into U+DC80..U+DCFF.
_RAW_BYTES = re.compile("([\udc80-\udcff]+)")
_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class Tokenizer(ABC):
    """Text to token ids and back without loss: ``decode_bytes(encode(data)) == data`` for every byte string.

    Args:
        table: the bytes of each id; None where an id is not in use.
        special_tokens: the id of each special token by its text.
        eos_token: the special token that ends a document.

    Raises:
        ValueError: ``eos_token`` is no special token, or some byte has no token of its own.
    """

    kind: ClassVar[str]
    """What kind of tokenizer this is: "bytes" or "bpe"."""

    def __init__(
        self,
        table: Sequence[bytes | None],
        special_tokens: Mapping[str, int],
        eos_token: str = END_OF_TEXT,
    ) -> None:
        if eos_token not in special_tokens:
            raise ValueError(f"eos_token {eos_token!r} is not one of the special tokens {sorted(special_tokens)}")
        self.special_tokens = dict(special_tokens)
        self.eos_token = eos_token
        self._table = list(table)
        self._byte_ids = _single_byte_ids(self._table, special_ids=set(self.special_tokens.values()))
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        specials = "|".join(map(re.escape, longest_first))
        self._raw_or_special = re.compile(f"([\udc80-\udcff]+|{specials})")

    @property
    def vocab_size(self) -> int:
        """The number of ids; every id is in [0, vocab_size)."""
        return len(self._table)

    @property
    def eos_id(self) -> int:
        """The id of the end-of-text token, which follows every document."""
        return self.special_tokens[self.eos_token]

    def encode(self, text: str | bytes, *, allowed_special: bool = False) -> list[int]:
        """The ids of ``text``.

        Bytes that are not UTF-8 become the tokens of those single bytes, whether ``text`` is a ``bytes`` or a ``str``
        read with errors="surrogateescape".

        Args:
            text: what to encode.
            allowed_special: whether the text of a special token becomes its id. By default it is text like any
                other, so that no input can forge the end of a document.

        Raises:
            TypeError: ``text`` is neither str nor bytes.
            ValueError: ``text`` holds a lone surrogate that stands for no byte.
        """
        return self.encode_batch([text], allowed_special=allowed_special)[0]

    def encode_batch(self, texts: Iterable[str | bytes], *, allowed_special: bool = False) -> list[list[int]]:
        """``encode`` of each text; a tokenizer may share the work among threads."""
        # Odd parts are what the pattern's group matched; even parts are the ordinary text between.
        cut = self._raw_or_special if allowed_special else _RAW_BYTES
        split = [cut.split(_as_str(text)) for text in texts]
        ordinary = iter(self._encode_ordinary([part for parts in split for part in parts[::2]]))
        return [
            list(
                chain.from_iterable(self._encode_cut(part) if i % 2 else next(ordinary) for i, part in enumerate(parts))
            )
            for parts in split
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 (half a character, say) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``; ValueError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; ValueError for an id outside the vocabulary."""
        index = operator.index(id)
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size} ids")
        data = self._table[index]
        if data is None:
            raise ValueError(f"token id {index} is not in use in this vocabulary")
        return data

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what every id stands for: two tokenizers with one fingerprint decode alike."""
        digest = hashlib.sha256(f"eos {self.eos_id}".encode())
        for data in self._table:
            digest.update(b"unused" if data is None else b"%d:%s" % (len(data), data))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a token file or a checkpoint notes down, to tell later whether it belongs to this tokenizer."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "fingerprint": self.fingerprint,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the tokenizer into ``folder``, atomically, for ``load_tokenizer``."""
        write_json(Path(folder) / CONFIG_NAME, self._config())

    def _config(self) -> dict[str, Any]:
        return {"fastgpt_kind": self.kind, "eos_token": self.eos_token}

    @abstractmethod
    def _encode_ordinary(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; texts hold no surrogates, and special tokens in them are ordinary text."""

    def _encode_cut(self, part: str) -> list[int]:
        """The ids of a special token or of a run of bytes that are not UTF-8."""
        if part in self.special_tokens:
            return [self.special_tokens[part]]
        return [self._byte_ids[byte] for byte in part.encode("utf-8", errors="surrogateescape")]


class IncrementalDecoder:
    """Decodes ids as they come and never gives out half a UTF-8 character (after ``codecs.IncrementalDecoder``).

    The pieces, joined, are ``tokenizer.decode`` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, ids: Iterable[int], *, final: bool = False) -> str:
        """The text that ``ids`` complete, perhaps none yet.

        ``final`` says that no more ids follow: what is left of a character then shows as U+FFFD.
        """
        return self._utf8.decode(self._tokenizer.decode_bytes(ids), final)


def _as_str(text: str | bytes) -> str:
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="surrogateescape")
    if not isinstance(text, str):
        raise TypeError(f"text must be str or bytes, not {type(text).__name__}")
    if surrogate := _OTHER_SURROGATE.search(text):
        raise ValueError(
            f"text holds the lone surrogate {surrogate[0]!r} at character {surrogate.start()}; "
            "only U+DC80..U+DCFF (errors='surrogateescape') stand for bytes"
        )
    return text


def _single_byte_ids(table: Sequence[bytes | None], special_ids: set[int]) -> list[int]:
    """The id of each of the 256 bytes."""
    ids = {data: id for id, data in enumerate(table) if data and len(data) == 1 and id not in special_ids}
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise ValueError(
            f"the vocabulary is not byte-level: {len(missing)} of the 256 bytes have no token "
            f"(the first is 0x{missing[0]:02x})"
        )
    return [ids[bytes([byte])] for byte in range(256)]
