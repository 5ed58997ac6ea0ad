"""Documents are read whole or refused by name; token files are whole or refused; batches resume exactly."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import (
    BatchLoader,
    TokenFile,
    corpus,
    documents,
    encode_documents,
    python_corpus,
    read_documents,
    sequential_batches,
    write_tokens,
)
from fastgpt.tokenizers import BPETokenizer, ByteTokenizer


def read(*sources: str | Path, **options: object) -> list[str]:
    return list(read_documents(sources, **options))  # type: ignore[arg-type]


def jsonl(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


class TestReadDocuments:
    def test_a_text_file_is_one_document_as_it_is(self, tmp_path: Path) -> None:
        (tmp_path / "a.anything").write_bytes("\ufeffone\r\ntwo é\n".encode())
        assert list(read_documents(tmp_path / "a.anything")) == ["one\r\ntwo é\n"]

    def test_jsonl_is_a_document_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(jsonl({"text": "one\ntwo"}, {"text": ""}, {"text": "três"}) + b"\n \n")
        assert read(path) == ["one\ntwo", "três"]
        path.write_bytes(jsonl({"body": "x", "text": "y"}))
        assert read(path, text_field="body") == ["x"]

    def test_gzip(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zipped"))
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": "line"})))
        assert read(tmp_path / "a.txt.gz", tmp_path / "b.jsonl.gz") == ["zipped", "line"]

    def test_a_folder_is_read_in_sorted_order(self, tmp_path: Path) -> None:
        files = {
            "b.md": b"b", "a/z.txt": b"z", "c.TXT": b"c", "empty.txt": b"", "no.png": b"\xff", "tar.tar.gz": b"\xff",
            ".hidden.txt": b"\xff", ".git/x.txt": b"\xff", "d.txt.gz": gzip.compress(b"d"),
        }  # fmt: skip
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        assert read(tmp_path) == ["z", "b", "c", "d"]

    def test_globs_and_a_file_reached_twice(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for name in ("a.txt", "sub/b.txt", "sub/[c].txt"):
            (tmp_path / name).write_text(name)
        assert read(f"{tmp_path}/**/*.txt") == ["a.txt", "sub/[c].txt", "sub/b.txt"]
        assert read(f"{tmp_path}/sub/b.txt", f"{tmp_path}/*") == ["sub/b.txt", "a.txt"]
        assert read(f"{tmp_path}/sub/[c].txt") == ["sub/[c].txt"]  # a name that exists is no pattern

    def test_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped é".encode())))
        assert read("-") == ["piped é"]

    @given(
        parts=st.lists(st.text(alphabet="aé🙂<|>\n", max_size=12), max_size=6),
        chunk=st.integers(1, 9),
        separator=st.sampled_from(["<|>", "<<", "\n", None]),
    )
    def test_pieces_and_separators(
        self, parts: list[str], chunk: int, separator: str | None, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        text = (separator or "").join(parts)
        path = tmp_path_factory.getbasetemp() / "pieces.txt"
        path.write_bytes(text.encode())
        expected = [d for d in (text.split(separator) if separator else [text]) if d and not d.isspace()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(documents, "_CHUNK", chunk)
            if expected:
                assert read(path, separator=separator) == expected
            else:
                with pytest.raises(ValueError, match="holds no text"):
                    read(path, separator=separator)

    @pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
    @pytest.mark.parametrize(
        ("data", "offset", "byte"),
        [(b"caf\xe9 x", 3, "e9"), (b"ab\n\xf0\x9f", 3, "f0"), ("é".encode() + b"\xff", 2, "ff")],
    )
    def test_bad_utf8_names_file_and_offset(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        chunk: int,
        name: str,
        data: bytes,
        offset: int,
        byte: str,
    ) -> None:
        monkeypatch.setattr(documents, "_CHUNK", chunk)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8: byte 0x{byte} at offset {offset} "):
            read(tmp_path / name)

    def test_bad_utf8_by_option(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}')
        for name in ("a.txt", "a.jsonl"):
            assert read(tmp_path / name, errors="replace") == ["caf\N{REPLACEMENT CHARACTER}"]
            assert read(tmp_path / name, errors="ignore") == ["caf"]
            raw = read(tmp_path / name, errors="surrogateescape")
            assert ByteTokenizer().encode(raw[0]) == list(b"caf\xe9")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "x"', "line 2: not a JSON record"),
            (b'["text"]', "line 2: a record must be a JSON object, not a list"),
            (b'{"body": "x"}', r"line 2: the record has no field 'text'; its fields are \['body'\]"),
            (b'{"text": null}', "line 2: the field 'text' must be a string, not a NoneType"),
            (b'{"text": "\\ud800"}', "line 2: the field 'text' holds half a surrogate pair"),
            (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at offset 24"),
        ],
    )
    def test_a_bad_record_names_its_line(self, tmp_path: Path, line: bytes, message: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(jsonl({"text": "1"}) + line + b"\n")
        assert len(jsonl({"text": "1"})) + len(b'{"text": "') == 24
        with pytest.raises(ValueError, match=rf"a\.jsonl.*{message}"):
            read(path)

    @pytest.mark.parametrize(
        "data", [gzip.compress(b"text" * 100, mtime=0)[:-9], b"plain text", gzip.compress(b"text", mtime=0)[:12]]
    )
    def test_a_broken_gzip_file(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.txt.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.txt\.gz is not a whole gzip file"):
            read(tmp_path / "a.txt.gz")

    def test_nothing_there_is_said_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").touch()
        with pytest.raises(FileNotFoundError, match=r"no file or folder '.*missing.txt'"):
            read_documents(tmp_path / "missing.txt")
        with pytest.raises(FileNotFoundError, match=r"no file matches '.*\*\.txt'"):
            read_documents(f"{tmp_path}/*.txt")
        with pytest.raises(FileNotFoundError, match=r"no file in the folder .* ends in \.txt, "):
            read_documents(tmp_path)
        with pytest.raises(ValueError, match="sources is empty"):
            read_documents([])
        with pytest.raises(ValueError, match="separator must not be empty"):
            read_documents(tmp_path, separator="")

    def test_no_text(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text(" \n")
        (tmp_path / "b.txt").touch()
        with pytest.raises(ValueError, match=r"b\.txt holds no text"):
            read(tmp_path / "b.txt")
        with pytest.raises(ValueError, match=r"there is no text in .*: 2 files without any"):
            read(tmp_path)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(ValueError, match="stdin holds no text"):
            read("-")


class TestPythonCorpus:
    def test_is_english(self) -> None:
        texts = python_corpus()
        assert len(set(texts)) == len(texts)
        assert 500_000 < sum(map(len, texts)) < 20_000_000
        text = "\n".join(texts)
        assert text.count(" the ") > 5_000
        assert text.encode()  # no half surrogate pairs

    def test_gathers_each_docstring_once_in_a_fixed_order(self, tmp_path: Path) -> None:
        source = """
            '''One.'''
            try:
                class A:
                    async def f(self): "Two."
            except ValueError: "not a docstring"
            else:
                def g():
                    x = 1
                    if x:
                        def h(): "Three."
            finally:
                def i(): "One."
        """
        for name in ("b.py", "a/z.py", "test/t.py", "site-packages/s.py"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"'{name}'")
        (tmp_path / "c.py").write_text(textwrap.dedent(source))
        (tmp_path / "broken.py").write_text('"""Not Python."""\nprint 1\n')
        assert list(corpus._docstrings(tmp_path)) == ["a/z.py\n", "b.py\n", "One.\n\nTwo.\n\nThree.\n"]

    def test_says_when_python_is_stripped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "module.py").write_text('"""One docstring."""\n')
        monkeypatch.setattr(corpus, "_topics", lambda: iter(["a topic"]))
        monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(ValueError, match="only 22 characters of documentation"):
            python_corpus()


def write(path: Path, ids: Iterable[int], vocab_size: int = 1000) -> TokenFile:
    return write_tokens(path, [list(ids)], vocab_size)


class TestTokenFile:
    @given(
        texts=st.lists(st.lists(st.integers(0, 299), max_size=20), max_size=8).filter(any),
        vocab_size=st.sampled_from([300, 1 << 16, (1 << 16) + 1, 1 << 32]),
    )
    def test_comes_back_the_same(
        self, texts: list[list[int]], vocab_size: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "round.bin"
        write_tokens(path, iter(texts), vocab_size)
        file = TokenFile(path)
        assert file.tokens.tolist() == [id for ids in texts for id in ids]
        assert file.tokens.dtype == ("<u2" if vocab_size <= 1 << 16 else "<u4")
        assert file.vocab_size == vocab_size
        file.verify()

    def test_the_largest_ids_fit(self, tmp_path: Path) -> None:
        for vocab_size in (1 << 16, 1 << 32):
            assert write(tmp_path / "a.bin", [vocab_size - 1], vocab_size).tokens.tolist() == [vocab_size - 1]

    def test_from_text(self, tmp_path: Path) -> None:
        tokenizer = ByteTokenizer()
        ids = encode_documents(["ab", "c<|endoftext|>"], tokenizer)
        file = write_tokens(tmp_path / "a.bin", ids, tokenizer.vocab_size, tokenizer.describe())
        assert tokenizer.decode(file.tokens) == "ab<|endoftext|>c<|endoftext|><|endoftext|>"
        assert np.flatnonzero(file.tokens == tokenizer.eos_id).tolist() == [2, len(file) - 1]
        TokenFile(tmp_path / "a.bin").check_tokenizer(ByteTokenizer())
        with pytest.raises(ValueError, match="another tokenizer: bytes of 257 ids, not this bpe of 258 ids"):
            file.check_tokenizer(BPETokenizer.train(["ab ab"], 258))

    def test_documents_are_encoded_in_batches_of_bounded_size(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastgpt.data.token_file._BATCH", 5)
        drawn = []

        def texts() -> Iterator[str]:
            for text in ["abc", "def", "g", "hijklmn", "o"]:
                drawn.append(text)
                yield text

        encoded = encode_documents(texts(), ByteTokenizer())
        assert next(encoded) == [*b"abc", 256]
        assert drawn == ["abc", "def"]
        assert list(encoded) == [[*text, 256] for text in (b"def", b"g", b"hijklmn", b"o")]

    def test_split_by_documents(self, tmp_path: Path) -> None:
        texts = [[i, i] for i in range(100)]
        file = write_tokens(tmp_path / "a.bin", texts, 100, validation_fraction=0.2, seed=1)
        train, validation = file.split()
        assert 19 <= len(validation) // 2 <= 21
        for part in (train, validation):
            pairs = part.tokens.reshape(-1, 2)
            assert (pairs[:, 0] == pairs[:, 1]).all()
            assert (np.diff(pairs[:, 0].astype(int)) > 0).all()
        assert sorted([*train.tokens, *validation.tokens]) == [i for i in range(100) for _ in range(2)]
        again = write_tokens(tmp_path / "b.bin", texts, 100, validation_fraction=0.2, seed=1)
        other = write_tokens(tmp_path / "c.bin", texts, 100, validation_fraction=0.2, seed=2)
        assert again.sha256 == file.sha256 != other.sha256
        assert not list(tmp_path.glob("*tmp*"))

    @given(
        lengths=st.lists(st.integers(5, 10), min_size=25, max_size=60),
        fraction=st.floats(0.1, 0.9),  # of 125 tokens at least: more than a document, so no side comes out empty
        seed=st.integers(0, 99),
    )
    def test_the_share_is_right_to_a_document(
        self, lengths: list[int], fraction: float, seed: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        texts = [[0] * length for length in lengths]
        path = tmp_path_factory.getbasetemp() / "share.bin"
        train, validation = write_tokens(path, texts, 1, validation_fraction=fraction, seed=seed).split()
        assert len(train) + len(validation) == sum(lengths)
        assert abs(len(validation) - fraction * sum(lengths)) <= max(lengths)

    def test_split_off_the_tail(self, tmp_path: Path) -> None:
        train, validation = write(tmp_path / "a.bin", range(100)).split(0.1)
        assert train.tokens.tolist() == list(range(90))
        assert validation.tokens.tolist() == list(range(90, 100))
        assert (train.start, validation.start) == (0, 90)
        assert validation.split(0.5)[1].start == 95

    def test_bad_splits(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.bin", range(10))
        with pytest.raises(ValueError, match="was written without validation documents"):
            file.split()
        with pytest.raises(ValueError, match=r"validation_fraction must be in \(0, 1\), not 1.5"):
            file.split(1.5)
        with pytest.raises(ValueError, match=r"leaves a part of .* empty"):
            file.split(0.01)
        with pytest.raises(ValueError, match=r"validation_fraction must be in \[0, 1\), not 1"):
            write_tokens(tmp_path / "b.bin", [[1]], 2, validation_fraction=1)
        with pytest.raises(ValueError, match=r"of 0.5 and seed 0 put all of the 1 documents on one side"):
            write_tokens(tmp_path / "b.bin", [[1]], 2, validation_fraction=0.5)
        assert not (tmp_path / "b.bin").exists()

    @pytest.mark.parametrize(
        ("texts", "vocab_size", "message"),
        [
            ([[1], [2, 9]], 9, "document 2: id 9 is outside the vocabulary of 9"),
            ([[1], [2, -1]], 9, "document 2: id -1 is outside"),
            ([[1.5]], 9, "document 1: ids must be one row of integers, not float64"),
            ([[[1]]], 9, "document 1: ids must be one row"),
            ([[], []], 9, "no tokens to write"),
            ([], 9, "no tokens to write"),
            ([[0]], 0, "vocab_size must be from 1 to"),
        ],
    )
    def test_bad_ids_leave_the_old_file(self, tmp_path: Path, texts: list, vocab_size: int, message: str) -> None:
        write(tmp_path / "a.bin", range(5))
        with pytest.raises(ValueError, match=message):
            write_tokens(tmp_path / "a.bin", texts, vocab_size)
        assert TokenFile(tmp_path / "a.bin").tokens.tolist() == list(range(5))
        assert len(list(tmp_path.iterdir())) == 2

    def test_interrupted(self, tmp_path: Path) -> None:
        def texts() -> Iterator[list[int]]:
            yield [1, 2]
            raise KeyboardInterrupt

        write(tmp_path / "a.bin", range(5))
        with pytest.raises(KeyboardInterrupt):
            write_tokens(tmp_path / "a.bin", texts(), 9)
        assert TokenFile(tmp_path / "a.bin").tokens.tolist() == list(range(5))

    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.bin", range(5))

        def full_disk(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"No space left on device: .*a\.bin"):
            write(tmp_path / "a.bin", range(6, 11))
        assert TokenFile(tmp_path / "a.bin").tokens.tolist() == list(range(5))
        assert len(list(tmp_path.iterdir())) == 2

    def test_cut_short_between_ids_and_description(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "a.bin", range(5))

        def full_disk(path: Path, value: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr("fastgpt.data.token_file.write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "a.bin", range(6, 11))
        with pytest.raises(FileNotFoundError, match="writing it was cut short"):
            TokenFile(tmp_path / "a.bin")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
    def test_an_unwritable_folder(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError, match=r"a\.bin"):
            write(tmp_path / "a.bin", range(5))

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "taken").touch()
        with pytest.raises(OSError, match="taken"):
            write(tmp_path / "taken" / "a.bin", range(5))

    @pytest.mark.parametrize("damage", [b"", b"\x00\x00", b"\x00" * 11])
    def test_truncated_or_grown(self, tmp_path: Path, damage: bytes) -> None:
        write(tmp_path / "a.bin", range(5))
        (tmp_path / "a.bin").write_bytes(damage)
        with pytest.raises(ValueError, match=rf"truncated or corrupt: {len(damage)} bytes instead of 10"):
            TokenFile(tmp_path / "a.bin")

    def test_changed(self, tmp_path: Path) -> None:
        write(tmp_path / "a.bin", range(5), vocab_size=5)
        (tmp_path / "a.bin").write_bytes(np.array([0, 1, 2, 3, 7], "<u2").tobytes())
        file = TokenFile(tmp_path / "a.bin")
        with pytest.raises(ValueError, match="is corrupt: its SHA-256 is"):
            file.verify()
        with pytest.raises(ValueError, match="is corrupt: it holds id 7, outside its vocabulary of 5"):
            next(BatchLoader(file, 1, 4))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": None}, "has no format"),
            ({"dtype": "int8"}, "dtype cannot be 'int8'"),
            ({"dtype": []}, r"dtype cannot be \[\]"),
            ({"count": "5"}, "count cannot be '5'"),
            ({"count": 0}, "count cannot be 0"),
            ({"train_count": 6}, "train_count cannot be 6"),
            ({"vocab_size": -1}, "vocab_size cannot be -1"),
            ({"sha256": None}, "sha256 cannot be None"),
            ({"tokenizer": "bytes"}, "tokenizer cannot be 'bytes'"),
        ],
    )
    def test_a_bad_description(self, tmp_path: Path, change: dict, message: str) -> None:
        write(tmp_path / "a.bin", range(5))
        path = tmp_path / "a.bin.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=rf"a\.bin\.json.*{message}"):
            TokenFile(tmp_path / "a.bin")
        path.write_text("{")
        with pytest.raises(ValueError, match=r"a\.bin\.json is not valid JSON"):
            TokenFile(tmp_path / "a.bin")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"a\.bin"):
            TokenFile(tmp_path / "a.bin")


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """1003 tokens, each its own position."""
    return write(tmp_path_factory.mktemp("tokens") / "counting.bin", range(1003), vocab_size=1003)


def take(loader: BatchLoader, count: int) -> list[torch.Tensor]:
    return [next(loader)[0] for _ in range(count)]


class TestBatchLoader:
    def test_targets_are_the_next_tokens(self, counting: TokenFile) -> None:
        inputs, targets = next(BatchLoader(counting, 3, 8))
        assert inputs.shape == targets.shape == (3, 8)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))

    @given(
        count=st.integers(2, 60),
        context=st.integers(1, 20),
        batch_size=st.integers(1, 7),
        seed=st.integers(0, (1 << 64) - 1),
    )
    def test_each_epoch_is_every_window_once(
        self, count: int, context: int, batch_size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        file = write(tmp_path_factory.getbasetemp() / "epoch.bin", range(count))
        if count < context + 1:
            with pytest.raises(ValueError, match=f"holds {count} tokens, .* needs at least {context + 1}"):
                BatchLoader(file, batch_size, context)
            return
        loader = BatchLoader(file, 1, context, seed=seed)
        stream = []  # the first inputs of the windows, over three epochs
        for epoch in range(3):
            starts = []
            while loader.epochs < epoch + 1:
                starts.append(int(next(loader)[0][0, 0]))
            offset = min(starts)
            assert sorted(starts) == list(range(offset, count - context, context))
            assert offset < context
            stream += starts
        batches = BatchLoader(file, batch_size, context, seed=seed)
        rows = [int(row[0]) for batch in take(batches, len(stream) // batch_size) for row in batch]
        assert rows == stream[: len(rows)]

    def test_epochs_and_seeds_differ(self, counting: TokenFile) -> None:
        first = BatchLoader(counting, 10, 10, seed=1)
        epochs = [torch.cat(take(first, 10)) for _ in range(3)]
        assert not torch.equal(epochs[0], epochs[1])
        assert len({int(epoch.min()) for epoch in epochs}) > 1  # the offset moves
        assert not torch.equal(epochs[0], torch.cat(take(BatchLoader(counting, 10, 10, seed=2), 10)))
        assert torch.equal(epochs[0], torch.cat(take(BatchLoader(counting, 10, 10, seed=1), 10)))

    def test_the_order_never_changes(self, counting: TokenFile) -> None:
        """Written down, so that another numpy or another machine cannot reorder a run without a test noticing."""
        batches = take(BatchLoader(counting, 5, 100, seed=1234), 3)
        starts = [[int(row[0]) for row in batch] for batch in batches]
        assert starts == [[792, 892, 692, 292, 92], [392, 192, 492, 592, 851], [451, 551, 351, 151, 751]]

    @pytest.mark.parametrize("steps", [0, 1, 7, 33, 34, 100])
    def test_resumes_exactly(self, counting: TokenFile, steps: int) -> None:
        loader = BatchLoader(counting, 3, 10, seed=5)
        take(loader, steps)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = BatchLoader(counting, 3, 10, seed=5)
        take(resumed, 2)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for mine, theirs in zip(take(resumed, 80), take(loader, 80), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_share_the_batch_of_one(self, counting: TokenFile, world_size: int) -> None:
        ranks = [BatchLoader(counting, 4, 10, rank=rank, world_size=world_size) for rank in range(world_size)]
        one = BatchLoader(counting, 4 * world_size, 10)
        for _ in range(40):
            assert torch.equal(torch.cat([next(rank)[0] for rank in ranks]), next(one)[0])
        assert ranks[0].state_dict() == ranks[1].state_dict() == one.state_dict()

    def test_refuses_a_state_of_something_else(self, counting: TokenFile, tmp_path: Path) -> None:
        state = BatchLoader(counting, 3, 10, seed=5).state_dict()
        with pytest.raises(ValueError, match="seed was 5 and is now 6"):
            BatchLoader(counting, 3, 10, seed=6).load_state_dict(state)
        with pytest.raises(ValueError, match="context was 10 and is now 11"):
            BatchLoader(counting, 3, 11, seed=5).load_state_dict(state)
        with pytest.raises(ValueError, match="sha256 was"):
            BatchLoader(write(tmp_path / "a.bin", range(50)), 3, 10, seed=5).load_state_dict(state)
        with pytest.raises(ValueError, match="start was 0 and is now 501"):
            BatchLoader(counting.split(0.5)[1], 3, 10, seed=5).load_state_dict(state)
        with pytest.raises(ValueError, match="position 1000 of"):
            BatchLoader(counting, 3, 10, seed=5).load_state_dict(state | {"position": 1000})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
            ({"context": 0}, "context must be at least 1, not 0"),
            ({"world_size": 0}, "world_size must be at least 1, not 0"),
            ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), not 2"),
            ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), not -1"),
            ({"context": 1003}, "holds 1003 tokens, but a context of 1003 needs at least 1004"),
        ],
    )
    def test_bad_arguments(self, counting: TokenFile, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BatchLoader(counting, **({"batch_size": 2, "context": 10} | arguments))


class TestSequentialBatches:
    @given(count=st.integers(2, 60), context=st.integers(1, 20), batch_size=st.integers(1, 7), world=st.integers(1, 3))
    def test_every_window_once(
        self, count: int, context: int, batch_size: int, world: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        file = write(tmp_path_factory.getbasetemp() / "sequential.bin", range(count))
        if count < context + 1:
            with pytest.raises(ValueError, match=f"holds {count} tokens, .* needs at least {context + 1}"):
                sequential_batches(file, batch_size, context)
            return
        ranks = [list(sequential_batches(file, batch_size, context, rank=r, world_size=world)) for r in range(world)]
        batches = [batch for r in ranks for batch in r]
        assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)
        assert sum(len(inputs) < batch_size for inputs, _ in batches) <= 1
        predicted = torch.cat([targets.flatten() for _, targets in batches]).sort().values
        assert torch.equal(predicted, torch.arange(1, (count - 1) // context * context + 1))
        if world == 1:
            assert torch.equal(predicted, torch.cat([targets.flatten() for _, targets in batches]))
