"""One token a byte: the tokenizer that needs no training and knows every language and file."""

from __future__ import annotations

from fastgpt.tokenizers.base import END_OF_TEXT, Tokenizer


class ByteTokenizer(Tokenizer):
    """257 ids: the 256 bytes as themselves, then the end-of-text token."""

    kind = "bytes"

    def __init__(self) -> None:
        table = [bytes([byte]) for byte in range(256)] + [END_OF_TEXT.encode()]
        super().__init__(table, special_tokens={END_OF_TEXT: 256})

    def _encode_ordinary(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]
