"""GPT-2's own BPE, built from its table of ranks: 50,257 ids, of which 50,256 is the end of text.

A ranks file (tiktoken's format) holds one token a line, its bytes in base64 and its rank: first the 256 bytes, then
each token in the order in which the merges made it. The rank is the id. The table comes with several packages but
not with this one.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from fastgpt.tokenizers.base import END_OF_TEXT
from fastgpt.tokenizers.bpe import BPETokenizer

RANKS_VARIABLE = "FASTGPT_GPT2_RANKS"

_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_TIKTOKEN_SOURCE = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"

_HOW_TO_GET_THEM = f"""\
GPT-2's BPE ranks are not at hand. Any one of these brings them:
  - set {RANKS_VARIABLE} to a copy of gpt2.tiktoken or r50k_base.tiktoken
  - pip install --no-deps openai-whisper   (it carries whisper/assets/gpt2.tiktoken, and is found by itself)
  - pip install tiktoken, then python -c "import tiktoken; tiktoken.get_encoding('r50k_base')"   (downloads, caches)"""


def gpt2_tokenizer(ranks: str | os.PathLike[str] | None = None) -> BPETokenizer:
    """GPT-2's tokenizer: ``encode("Hello world")`` is [15496, 995].

    Args:
        ranks: the ranks file; by default what ``find_gpt2_ranks`` finds.

    Raises:
        FileNotFoundError: no ranks at hand (says how to get them), or none at ``ranks``.
        ValueError: the file is not GPT-2's table.
    """
    path = find_gpt2_ranks() if ranks is None else Path(ranks)
    if path is None:
        raise FileNotFoundError(_HOW_TO_GET_THEM)
    if hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise ValueError(f"{path} is not GPT-2's table of ranks (its SHA-256 is not {_SHA256})")
    return tokenizer_from_ranks(path)


def find_gpt2_ranks() -> Path | None:
    """GPT-2's ranks file on this machine, or None.

    Looked for in this order: the path in FASTGPT_GPT2_RANKS (then there or nowhere), the installed ``whisper``
    package, tiktoken's cache.
    """
    if named := os.environ.get(RANKS_VARIABLE):
        return Path(named)
    return next((path for path in _usual_places() if path.is_file()), None)


def tokenizer_from_ranks(path: str | os.PathLike[str]) -> BPETokenizer:
    """A tokenizer with GPT-2's word pattern from any ranks file; the end-of-text token takes the next id.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a complete table of BPE ranks (names the line or the token).
    """
    ranks = read_ranks(path)
    try:
        return BPETokenizer.from_merges(ranks, _merges(ranks), special_tokens=(END_OF_TEXT,))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_ranks(path: str | os.PathLike[str]) -> dict[bytes, int]:
    """The rank of each token; ValueError names a line that does not fit or a rank that is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            if token in ranks:
                raise ValueError("a token for the second time")
            ranks[token] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected 'base64 rank', found {line[:60]!r}: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once")
    return ranks


def _usual_places() -> Iterator[Path]:
    whisper = importlib.util.find_spec("whisper")  # finds the package without running it
    for folder in (whisper.submodule_search_locations if whisper else None) or []:
        yield Path(folder) / "assets" / "gpt2.tiktoken"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    tiktoken = Path(cache) if cache else Path(tempfile.gettempdir()) / "data-gym-cache"
    yield tiktoken / hashlib.sha1(_TIKTOKEN_SOURCE.encode(), usedforsecurity=False).hexdigest()


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merge that makes each token of two bytes or more, in the order of their ranks.

    The table keeps only what each merge gave. The two halves are what BPE leaves of the token with the merges that
    came before.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        halves = _apply_bpe(token, ranks, below=rank)
        if len(halves) != 2:
            raise ValueError(f"token {token!r} of rank {rank} is not a merge of two earlier tokens")
        yield halves[0], halves[1]


def _apply_bpe(word: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """The parts of ``word`` after every merge of rank lower than ``below``, lowest first."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        rank, i = min((ranks.get(left + right, below), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
