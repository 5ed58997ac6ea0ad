"""``fastgpt generate``, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import save_model
from fastgpt.cli import app
from fastgpt.cli import generate as command
from fastgpt.generation import generate
from fastgpt.tokenizers import ByteTokenizer

CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context=CONTEXT, layers=1, heads=2, width=16))
    return save_model(tmp_path_factory.mktemp("models") / "tiny", model, ByteTokenizer())


def run(folder: Path, *arguments: str, stdin: bytes | None = None):
    return CliRunner().invoke(app, ["generate", "--model", str(folder), *arguments], input=stdin)


def library(folder: Path, prompts: list[str], new: int, **options: object) -> list[str]:
    from fastgpt.checkpoint import load_model

    options = {"temperature": 0.8, "top_p": 0.95, "tokenizer": ByteTokenizer(), **options}
    return [r.text or "" for r in generate(load_model(folder), prompts, new, **options)]  # type: ignore[arg-type]


def test_prompt_and_text_on_stdout_numbers_on_stderr(folder: Path) -> None:
    result = run(folder, "--prompt", "Once é", "-n", "9", "--seed", "7")
    assert result.exit_code == 0
    (text,) = library(folder, ["Once é"], 9, seed=7)
    assert result.stdout == f"Once é{text}\n"
    assert "9 tokens in" in result.stderr
    assert "tokens/s after the first); seed 7" in result.stderr


def test_options_reach_the_sampler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(model: object, prompts: object, new: int, **options: object) -> list[object]:
        seen.update(options, prompts=prompts, new=new)
        return []

    monkeypatch.setattr(command, "continue_prompts", spy)
    options = "--temperature 0.5 --top-k 4 --top-p 0.8 --min-p 0.1 --repetition-penalty 1.2 --presence-penalty 0.3"
    options += " --frequency-penalty 0.4 --seed 3 --stop a --stop b --truncate --samples 2 --max-new-tokens 5"
    assert run(folder, "--prompt", "x", "--prompt", "y", *options.split()).exit_code == 0
    assert {k: v for k, v in seen.items() if k not in ("tokenizer", "stream")} == {
        "prompts": [[120], [120], [121], [121]],
        "new": 5,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "seed": [3, 4, 3, 4],
        "stop_strings": ["a", "b"],
        "truncate": "left",
    }


def test_several_texts_come_one_after_the_other(folder: Path) -> None:
    result = run(folder, "--prompt", "ab", "--prompt", "c", "--samples", "2", "-n", "6", "--seed", "1")
    texts = library(folder, ["ab", "ab", "c", "c"], 6, seed=[1, 2, 1, 2])
    prompts = ["ab", "ab", "c", "c"]
    assert result.stdout == "\n\n".join(p + t for p, t in zip(prompts, texts, strict=True)) + "\n"
    assert "--- 4 of 4" in result.stderr


def test_standard_input(folder: Path) -> None:
    result = run(folder, "--prompt", "-", "-n", "4", "--seed", "1", stdin=b"two\nlines\n")
    assert result.stdout == f"two\nlines{library(folder, [chr(10).join(['two', 'lines'])], 4, seed=1)[0]}\n"
    result = run(folder, "--prompt", "-", "--prompt", "-")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --prompt - reads standard input, which can be read only once\n",
    )


def test_no_prompt_begins_a_document(folder: Path) -> None:
    assert run(folder, "-n", "4", "--seed", "1").stdout == library(folder, [""], 4, seed=1)[0] + "\n"


def test_without_a_seed_the_one_drawn_is_told(folder: Path) -> None:
    first = run(folder, "-n", "12")
    seed = first.stderr.split("seed ")[1].split(";")[0].strip()
    assert run(folder, "-n", "12", "--seed", seed).stdout == first.stdout


def test_long_prompts_and_full_contexts(folder: Path) -> None:
    result = run(folder, "--prompt", "x" * 40)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: generate: prompts[0] has 40 tokens, but the model's context holds 32;")
    result = run(folder, "--prompt", "x" * 40, "--truncate", "-n", "5", "--seed", "1")
    assert result.exit_code == 0
    assert "dropped the first 13 tokens of the prompt" in result.stderr
    assert "stopped where the context of 32 tokens is full" in run(folder, "--prompt", "x" * 30, "--seed", "1").stderr


def test_interrupting_keeps_what_was_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: object, prompts: object, new: int, *, stream, **options: object) -> None:
        stream(0, 72, "H")
        stream(1, 73, "I")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "continue_prompts", interrupted)
    result = run(folder, "--prompt", "a", "--prompt", "b", "--seed", "5")
    assert result.exit_code == 130
    assert result.stdout == "aH\n\nbI\n"
    assert "2 tokens" in result.stderr
    assert "seed 5; interrupted" in result.stderr


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    printer = command._Printer([b""])
    assert printer._visible("\x1b[2J\n\té") == "\x1b[2J\n\té"
    printer._terminal = True
    assert printer._visible("\x1b[2J\n\té") == "\ufffd[2J\n\té"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "2"], "error: sample: top_p=2.0; it must be in (0, 1]"),
        (["--ops", "fast"], "has no backend 'fast'"),
        (["--device", "gpu"], "error: --device gpu cannot be used: "),
        (["--temperature", "-1"], "Invalid value for '--temperature'"),
        (["-n", "-1"], "Invalid value for '--max-new-tokens'"),
        (["--stop", ""], "stop_strings=[''] must be a list of texts, none empty"),
    ],
)
def test_bad_options(folder: Path, arguments: list[str], message: str) -> None:
    result = run(folder, "--prompt", "Hello", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_missing_and_damaged_models(folder: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "none").stderr.startswith(
        f"error: no checkpoint {tmp_path / 'none'}: there is no such folder"
    )
    assert run(tmp_path).stderr.startswith(f"error: no checkpoint in {tmp_path}")
    for name in ("model.safetensors", "config.json"):
        damaged = tmp_path / name
        damaged.mkdir()
        for file in folder.iterdir():
            data = file.read_bytes()
            (damaged / file.name).write_bytes(data[:-7] if file.name == name else data)
        result = run(damaged)
        assert result.exit_code == 1
        assert f"is damaged: {name} has" in result.stderr


def test_models_and_tokenizers_that_do_not_go_together(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=100, context=CONTEXT, layers=1, heads=2, width=16)
    save_model(tmp_path / "small", GPT(config), ByteTokenizer())
    assert "the tokenizer has 257 ids, the model only 100" in run(tmp_path / "small").stderr
    save_model(tmp_path / "bare", GPT(config))
    result = run(tmp_path / "bare")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no tokenizer in")
