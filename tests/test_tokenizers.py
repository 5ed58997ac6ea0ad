"""Tokenizers lose nothing, never forge a special token, and come back from disk as they were."""

from __future__ import annotations

import base64
import errno
import json
import os
from pathlib import Path

import pytest
import tokenizers as hf
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.tokenizers import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    IncrementalDecoder,
    Tokenizer,
    find_gpt2_ranks,
    gpt2_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from_ranks,
)

TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox is quick.\n",
    "def fox(dog):\n    return dog.jump(over='lazy')  # naïve café 漢字 🙂\n",
] * 5
TRAINED = BPETokenizer.train(TEXT, 320)


def tiny_ranks(path: Path) -> Path:
    """A ranks file of the 256 bytes and four merges: 256 'he', 257 'll', 258 'hell', 259 'hello'."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(tokens)))
    return path


@pytest.fixture(params=["bytes", "trained", "ranks"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    return TRAINED if request.param == "trained" else tokenizer_from_ranks(tiny_ranks(tmp_path / "tiny.tiktoken"))


ANY_BYTES = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=40).map(str.encode),
    st.lists(st.sampled_from([b"the fox", b" ", b"\n", b"\xf0\x9f", b"\xff", END_OF_TEXT.encode(), "é".encode()])).map(
        b"".join
    ),
)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "bpe"])
class TestEveryByteString:
    @given(data=ANY_BYTES, allowed_special=st.booleans())
    def test_round_trip(self, tokenizer: Tokenizer, data: bytes, allowed_special: bool) -> None:
        ids = tokenizer.encode(data, allowed_special=allowed_special)
        assert tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode(ids) == data.decode("utf-8", "replace")
        assert all(0 <= id < tokenizer.vocab_size for id in ids)

    @given(data=ANY_BYTES)
    def test_no_special_token_unless_allowed(self, tokenizer: Tokenizer, data: bytes) -> None:
        assert tokenizer.eos_id not in tokenizer.encode(data)
        count = data.decode("utf-8", "surrogateescape").count(END_OF_TEXT)
        assert tokenizer.encode(data, allowed_special=True).count(tokenizer.eos_id) == count

    @given(text=st.text(max_size=40))
    def test_str_and_utf8_bytes_agree(self, tokenizer: Tokenizer, text: str) -> None:
        assert tokenizer.encode(text) == tokenizer.encode(text.encode())

    @given(texts=st.lists(ANY_BYTES, max_size=4), allowed_special=st.booleans())
    def test_a_batch_is_its_texts(self, tokenizer: Tokenizer, texts: list[bytes], allowed_special: bool) -> None:
        one_by_one = [tokenizer.encode(text, allowed_special=allowed_special) for text in texts]
        assert tokenizer.encode_batch(texts, allowed_special=allowed_special) == one_by_one

    @given(data=ANY_BYTES)
    def test_streaming_gives_whole_characters(self, tokenizer: Tokenizer, data: bytes) -> None:
        ids = tokenizer.encode(data)
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.decode([id]) for id in ids] + [decoder.decode([], final=True)]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_streaming_holds_a_character_back_until_it_is_whole() -> None:
    decoder = IncrementalDecoder(ByteTokenizer())
    assert [decoder.decode([byte]) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]
    assert decoder.decode([0xF0, 0x9F]) == ""
    assert decoder.decode([], final=True) == "\N{REPLACEMENT CHARACTER}"


def test_interface(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.eos_id) == END_OF_TEXT.encode()
    assert tokenizer.special_tokens == {END_OF_TEXT: tokenizer.eos_id}
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert sorted(tokenizer.token_bytes(id) for id in range(256)) == [bytes([byte]) for byte in range(256)]
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode(torch.tensor(ids)) == "the fox"


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("bytes", 257, 256)
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]


@pytest.mark.parametrize("id", [-1, 257, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(id: int) -> None:
    with pytest.raises(ValueError, match=f"id {id} is outside the vocabulary of 257"):
        ByteTokenizer().decode([65, id])


def test_bad_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="str or bytes, not int"):
        tokenizer.encode(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1"):
        tokenizer.encode("a\ud800")


class TestTraining:
    def test_size_and_layout(self) -> None:
        assert TRAINED.vocab_size == 320
        assert TRAINED.eos_id == 319
        assert len(TRAINED.encode("the quick fox")) < len("the quick fox") / 2

    def test_the_same_text_gives_the_same_tokenizer(self) -> None:
        assert BPETokenizer.train(iter(TEXT), 320).fingerprint == TRAINED.fingerprint

    def test_a_small_corpus_gives_fewer_ids(self) -> None:
        tokenizer = BPETokenizer.train(["ab ab"], 4096)
        assert tokenizer.vocab_size == 258  # 256 bytes, 'ab', the end of text
        assert tokenizer.encode("ab") == [256]

    def test_several_special_tokens(self, tmp_path: Path) -> None:
        tokenizer = BPETokenizer.train(TEXT, 300, special_tokens=["<end>", "<end>ing"])
        assert tokenizer.special_tokens == {"<end>": 298, "<end>ing": 299}
        assert tokenizer.encode("<end>ing<end>", allowed_special=True) == [299, 298]
        assert tokenizer.eos_id == 298
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).eos_id == 298

    def test_bytes_that_are_no_text_are_passed_over(self) -> None:
        documents = [text.encode().replace(b"\n", b"\xff").decode("utf-8", "surrogateescape") for text in TEXT]
        assert BPETokenizer.train(documents, 300).vocab_size == 300

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"documents": TEXT, "vocab_size": 256}, "vocab_size must be at least 257 .* not 256"),
            ({"documents": [], "vocab_size": 300}, "no text"),
            ({"documents": ["", ""], "vocab_size": 300}, "no text"),
            ({"documents": TEXT, "vocab_size": 300, "min_frequency": 0}, "min_frequency must be at least 1, not 0"),
            ({"documents": TEXT, "vocab_size": 300, "special_tokens": []}, "special_tokens must be"),
            ({"documents": TEXT, "vocab_size": 300, "special_tokens": ["<a>", "<a>"]}, "special_tokens must be"),
        ],
    )
    def test_bad_arguments(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BPETokenizer.train(**arguments)


class TestSaving:
    def test_comes_back_the_same(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "folder"
        tokenizer.save(folder)
        back = load_tokenizer(folder)
        assert type(back) is type(tokenizer)
        assert back.describe() == tokenizer.describe()
        text = "hello, the quick 漢字" + END_OF_TEXT
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode(text, allowed_special=True) == tokenizer.encode(text, allowed_special=True)
        assert all(path.suffix == ".json" for path in folder.iterdir())

    def test_different_tokenizers_have_different_fingerprints(self) -> None:
        prints = {t.fingerprint for t in (ByteTokenizer(), TRAINED, BPETokenizer.train(TEXT, 319))}
        assert len(prints) == 3

    @pytest.mark.slow  # the import of transformers
    def test_transformers_reads_it(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        TRAINED.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs("the quick 漢字")["input_ids"] == TRAINED.encode("the quick 漢字")
        assert theirs.eos_token_id == TRAINED.eos_id
        theirs.save_pretrained(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").describe() == TRAINED.describe()

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        TRAINED.save(tmp_path)

        def full_disk(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"No space left on device: .*tokenizer.json"):
            BPETokenizer.train(TEXT, 300).save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == TRAINED.fingerprint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no tokenizer in"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ("{", "tokenizer_config.json is not valid JSON"),
            ("[]", "must hold a JSON object, not a list"),
            ('{"fastgpt_kind": "words"}', "fastgpt_kind must be 'bytes' or 'bpe', not 'words'"),
            ('{"fastgpt_kind": "bpe", "eos_token": "</s>"}', "eos_token '</s>' is not one of the special tokens"),
        ],
    )
    def test_a_bad_config(self, tmp_path: Path, config: str, message: str) -> None:
        TRAINED.save(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 100, None])
    def test_a_corrupt_tokenizer_json(self, tmp_path: Path, damage: bytes | None) -> None:
        TRAINED.save(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer.json"):
            load_tokenizer(tmp_path)


class TestForeignTokenizers:
    """A tokenizer.json made elsewhere either loses nothing or is refused."""

    def edited(self, tmp_path: Path, **changes: object) -> Path:
        TRAINED.save(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return path

    def test_truncation_and_padding_are_put_aside(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        backend = hf.Tokenizer.from_str(TRAINED._backend.to_str())
        backend.enable_truncation(4)
        backend.enable_padding(length=8)
        backend.save(str(path))
        assert make_tokenizer(path).encode("the quick brown fox") == TRAINED.encode("the quick brown fox")

    @pytest.mark.parametrize("normalizer", [{"type": "Lowercase"}, {"type": "NFKC"}, {"type": "NFC"}])
    def test_a_normalizer_is_refused(self, tmp_path: Path, normalizer: dict) -> None:
        with pytest.raises(ValueError, match="this tokenizer changes text"):
            make_tokenizer(self.edited(tmp_path, normalizer=normalizer))

    def test_a_prefix_space_is_refused(self, tmp_path: Path) -> None:
        pre = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        with pytest.raises(ValueError, match="this tokenizer changes text"):
            make_tokenizer(self.edited(tmp_path, pre_tokenizer=pre))

    def test_a_vocabulary_of_words_is_refused(self, tmp_path: Path) -> None:
        backend = hf.Tokenizer(hf.models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
        backend.add_special_tokens([END_OF_TEXT])
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ValueError, match="not byte-level: 256 of the 256 bytes have no token"):
            load_tokenizer(tmp_path)


class TestMakeTokenizer:
    def test_by_name_and_path(self, tmp_path: Path) -> None:
        TRAINED.save(tmp_path)
        assert make_tokenizer("bytes").kind == "bytes"
        assert make_tokenizer(str(tmp_path)).fingerprint == TRAINED.fingerprint
        assert make_tokenizer(tmp_path / "tokenizer.json").fingerprint == TRAINED.fingerprint

    def test_unknown(self) -> None:
        with pytest.raises(FileNotFoundError, match="no tokenizer 'gpt3': it must be 'bytes', 'gpt2'"):
            make_tokenizer("gpt3")


class TestRanks:
    def test_made_up_ranks(self, tmp_path: Path) -> None:
        tokenizer = tokenizer_from_ranks(tiny_ranks(tmp_path / "tiny.tiktoken"))
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (261, 260)
        assert tokenizer.encode("hello hell hel") == [259, 32, 258, 32, 256, ord("l")]
        # GPT-2's pattern puts the space with the word, so no merge crosses from one word to the next.
        assert tokenizer.encode("he llo") == [256, 32, 257, ord("o")]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"aGU=", "line 5: expected 'base64 rank'"),
            (b"a?U= 4", "line 5: expected 'base64 rank'"),
            (b"aGU= four", "line 5: expected 'base64 rank'"),
            (b"AA== 4", "line 5: .* second time"),
            (b"BA== 9", "are not 0 to 259"),
            (b"", "are not 0 to 258"),
        ],
    )
    def test_a_bad_line(self, tmp_path: Path, line: bytes, message: str) -> None:
        path = tiny_ranks(tmp_path / "tiny.tiktoken")
        lines = path.read_bytes().splitlines()
        lines[4] = line
        path.write_bytes(b"\n".join(filter(None, lines)))
        with pytest.raises(ValueError, match=message):
            tokenizer_from_ranks(path)

    def test_a_token_that_no_merge_makes(self, tmp_path: Path) -> None:
        path = tiny_ranks(tmp_path / "tiny.tiktoken")
        with path.open("ab") as file:
            file.write(b"%s 260\n" % base64.b64encode(b"xyz"))
        with pytest.raises(ValueError, match="b'xyz' of rank 260 is not a merge of two earlier tokens"):
            tokenizer_from_ranks(path)

    def test_gpt2_refuses_another_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tiny_ranks(tmp_path / "tiny.tiktoken")
        monkeypatch.setenv("FASTGPT_GPT2_RANKS", str(path))
        with pytest.raises(ValueError, match=r"tiny.tiktoken is not GPT-2's table"):
            make_tokenizer("gpt2")

    def test_gpt2_says_how_to_get_its_ranks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FASTGPT_GPT2_RANKS", raising=False)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("sys.path", [str(tmp_path)])
        with pytest.raises(FileNotFoundError, match=r"(?s)not at hand.*FASTGPT_GPT2_RANKS.*pip install"):
            gpt2_tokenizer()

    def test_gpt2_finds_its_ranks_in_whisper(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FASTGPT_GPT2_RANKS", raising=False)
        assets = tmp_path / "whisper" / "assets"
        assets.mkdir(parents=True)
        (tmp_path / "whisper" / "__init__.py").write_text("raise AssertionError('imported')")
        ranks = tiny_ranks(assets / "gpt2.tiktoken")
        monkeypatch.syspath_prepend(tmp_path)
        assert find_gpt2_ranks() == ranks

    def test_gpt2(self, tmp_path: Path) -> None:
        if find_gpt2_ranks() is None:
            pytest.skip("GPT-2's ranks are not at hand (set FASTGPT_GPT2_RANKS to a gpt2.tiktoken)")
        tokenizer = gpt2_tokenizer()
        assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_id) == ("bpe", 50257, 50256)
        assert tokenizer.encode("Hello world") == [15496, 995]
        assert tokenizer.encode("naïve  café\n\n 🙂") == [2616, 38776, 220, 40304, 628, 32485]  # as tiktoken has it
        assert tokenizer.encode(END_OF_TEXT, allowed_special=True) == [50256]
        assert tokenizer.encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).describe() == tokenizer.describe()
