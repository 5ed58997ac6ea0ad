"""``fastgpt tokenize`` and ``fastgpt train-tokenizer``, as a person types them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from fastgpt.cli import app
from fastgpt.cli.tokenize import readable
from fastgpt.tokenizers import ByteTokenizer, load_tokenizer


def run(*arguments: str | Path, stdin: bytes | None = None, **options: object):
    return CliRunner().invoke(app, list(map(str, arguments)), input=stdin, **options)  # type: ignore[arg-type]


def test_pieces_with_ids_beneath() -> None:
    result = run("tokenize", "Hi é")
    assert result.exit_code == 0
    pieces, ids, summary = result.output.splitlines()
    assert pieces.split() == ["H", "i", "·", r"\xc3", r"\xa9"]
    assert ids.split() == ["72", "105", "32", "195", "169"]
    assert [match.start() for match in re.finditer(r"\S+", pieces)] == [
        match.start() for match in re.finditer(r"\S+", ids)
    ]
    assert summary == "5 tokens, 5 bytes, 1.00 bytes per token (bytes, 257 ids)"


def test_rows_are_as_wide_as_the_terminal() -> None:
    result = run("tokenize", "x" * 60, env={"COLUMNS": "40"})
    rows = result.output.splitlines()[:-1]
    assert all(len(row) <= 40 for row in rows)
    assert sum(row.count("x") for row in rows) == 60


def test_colours_on_a_terminal() -> None:
    result = run("tokenize", "ab", env={"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"})
    backgrounds = re.findall(r"\x1b\[30;48;2;(\d+;\d+;\d+)m([ab])\x1b\[0m", result.output)
    assert [letter for _, letter in backgrounds] == ["a", "b"]
    assert backgrounds[0][0] != backgrounds[1][0]


def test_ids_alone() -> None:
    assert run("tokenize", "--ids", "Hello").output == "72 101 108 108 111\n"
    assert run("tokenize", "--ids", stdin=b"\xff\n\x00").output == "255 10 0\n"
    assert run("tokenize", "--ids", "").output == "\n"


def test_nothing_to_show() -> None:
    assert run("tokenize", stdin=b"").output == "0 tokens, 0 bytes (bytes, 257 ids)\n"


def test_special_tokens_only_where_asked() -> None:
    assert run("tokenize", "--ids", "a<|endoftext|>").output.split()[-1] == str(ord(">"))
    assert run("tokenize", "--ids", "--special", "a<|endoftext|>").output == "97 256\n"
    assert "<|endoftext|>" in run("tokenize", "--special", "a<|endoftext|>").output


def test_text_that_looks_like_markup_is_shown_as_it_is() -> None:
    pieces = run("tokenize", "[b]").output.splitlines()[0]
    assert pieces.split() == ["[", "b", "]"]


def test_train_then_tokenize(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the fox and the hound and the fox\n" * 20)
    result = run("train-tokenizer", tmp_path / "text.txt", "--vocab-size", "270", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "270 ids in" in result.output
    shown = run("tokenize", "the fox", "--tokenizer", tmp_path / "out")
    assert "the ·fox" in shown.output
    ids = run("tokenize", "the fox", "--ids", "--tokenizer", tmp_path / "out" / "tokenizer.json").output
    assert load_tokenizer(tmp_path / "out").decode(map(int, ids.split())) == "the fox"


def test_train_says_when_the_text_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train-tokenizer", "-", stdin=b"ab ab")
    assert "The text has pairs for 258 ids only, not 4,096." in result.output
    assert load_tokenizer("tokenizer").vocab_size == 258


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "x", "--tokenizer", "nope"], "error: no tokenizer 'nope'"),
        (["train-tokenizer", "nope.txt"], "error: no file or folder 'nope.txt'"),
        (["train-tokenizer", "{folder}/bad.txt"], "is not UTF-8: byte 0xff at offset 2"),
        (["train-tokenizer", "{folder}/good.txt", "--vocab-size", "3"], "error: vocab_size must be at least 257"),
        (["train-tokenizer", "{folder}/good.txt", "--out", "{folder}/good.txt"], "error: .*good.txt"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "good.txt").write_bytes(b"ab ab")
    result = run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert result.exit_code == 1
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.output


def test_gpt2_without_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGPT_GPT2_RANKS", str(tmp_path / "missing.tiktoken"))
    result = run("tokenize", "x", "--tokenizer", "gpt2")
    assert result.exit_code == 1
    assert "missing.tiktoken" in result.stderr


def test_no_text_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr("fastgpt.cli.tokenize.sys", SimpleNamespace(stdin=terminal))
    result = run("tokenize")
    assert result.exit_code == 1
    assert "no text: give it as an argument" in result.stderr


def test_readable() -> None:
    assert readable(b" a\t\n") == r"·a\t\n"
    assert readable("é漢🙂".encode()) == "é漢🙂"
    assert readable(b"\xff\x00\x1b") == r"\xff\x00\x1b"
    assert readable("\u200b\u00a0".encode()) == r"\u200b\xa0"
    assert [readable(ByteTokenizer().token_bytes(id)) for id in (65, 255)] == ["A", r"\xff"]
