"""Checkpoints: exact, whole or absent, and damage is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fastgpt import checkpoint, files
from fastgpt.tokenizers import ByteTokenizer, load_tokenizer
from tests import tiny

FILES = [
    "checksums.json",
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer_config.json",
    "trainer.json",
]


@pytest.fixture
def saved(tmp_path):
    """A trainer after three steps, and its checkpoint."""
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run")
    for _ in range(3):
        trainer.train_step()
    return trainer, trainer.save()


# --- exact ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [{}, {"tie_weights": False, "norm": "rms_norm", "positions": "rotary", "activation": "swiglu", "bias": False}],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, shape):
    model = tiny.model(**shape).to(dtype)
    checkpoint.save_model(tmp_path / "model", model, ByteTokenizer())
    loaded = checkpoint.load_model(tmp_path / "model", ops="torch")
    assert tiny.bits(loaded) == tiny.bits(model)
    assert loaded.config == model.config
    assert loaded.ops.spec == "torch"
    assert not loaded.training
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert all(p.requires_grad for p in loaded.parameters())
    assert load_tokenizer(tmp_path / "model").fingerprint == ByteTokenizer().fingerprint
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model.set_ops("torch")(tokens))


def test_what_a_checkpoint_holds(saved):
    _, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert all(
        os.stat(path).st_mode & 0o777 == os.stat(folder / "config.json").st_mode & 0o777 for path in folder.iterdir()
    )
    assert json.loads((folder / "trainer.json").read_text())["step"] == 3


def test_the_model_outlives_its_files(saved):
    trainer, folder = saved
    loaded = checkpoint.load_model(folder)
    for path in folder.iterdir():
        path.write_bytes(b"")
    assert tiny.bits(loaded) == tiny.bits(trainer.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_comes_back_bit_for_bit(tmp_path, dtype):
    trainer = tiny.trainer(tmp_path, out=tmp_path / "run", dtype=dtype)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    other = tiny.trainer(tmp_path, out=tmp_path / "run", dtype=dtype, seed=1)
    assert other.resume() == []
    before, after = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for index, state in before["state"].items():
        assert ("master" in state) == (dtype == "bfloat16")
        for key, value in state.items():
            assert torch.equal(value, after["state"][index][key])
            assert value.dtype == after["state"][index][key].dtype == torch.float32


# --- found ---


def test_a_run_means_its_latest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step, loss in ((9, 2.0), (100_000_000, 1.0), (20, None)):
        checkpoint.save_checkpoint(
            checkpoint.checkpoint_path(run, step), tiny.model(), trainer={"step": step, "validation_loss": loss}
        )
    steps = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run)]
    assert steps == [9, 20, 100_000_000]
    assert (
        checkpoint.find_checkpoint(run)
        == checkpoint.find_checkpoint(run / "latest")
        == checkpoint.checkpoint_path(run, 100_000_000)
    )
    shutil.rmtree(checkpoint.checkpoint_path(run, 100_000_000))
    assert checkpoint.find_checkpoint(run).name == "step-00000020"
    assert checkpoint.find_checkpoint(run / "best").name == "step-00000009"


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        checkpoint.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither checksums\.json"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="it holds neither"):
        checkpoint.find_checkpoint(tmp_path / "best")


def test_an_unfinished_folder_is_no_checkpoint(saved, tmp_path):
    _, folder = saved
    unfinished = folder.with_name("step-00000099")
    shutil.copytree(folder, unfinished)
    (unfinished / "checksums.json").unlink()
    assert checkpoint.find_checkpoint(tmp_path / "run") == folder


# --- damaged or of something else ---


@pytest.mark.parametrize("name", [name for name in FILES if name != "checksums.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named(saved, name, damage):
    trainer, folder = saved
    path = folder / name
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.unlink()
    before = tiny.bits(trainer.model)
    with pytest.raises(ValueError, match=rf"damaged: {name} (has|is)"):
        checkpoint.load_model(folder)
    with pytest.raises(ValueError, match=rf"damaged: {name} (has|is)"):
        trainer.resume()
    assert tiny.bits(trainer.model) == before


def test_the_checkpoint_before_a_damaged_one_is_offered(saved, tmp_path):
    trainer, first = saved
    trainer.train_step()
    second = trainer.save()
    (second / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=f"The one before it is {first}"):
        checkpoint.load_model(tmp_path / "run")


def test_another_config_lists_what_differs(saved):
    _, folder = saved
    with pytest.raises(
        ValueError, match="another config: layers is 2 there and 3 here; width is 32 there and 64 here; mlp"
    ):
        checkpoint.load_checkpoint(folder, tiny.model(layers=3, width=64, head_dim=16))


def test_another_dtype_is_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"is torch\.float32, the model's torch\.bfloat16; .* and \d+ more"):
        checkpoint.load_checkpoint(folder, tiny.model().bfloat16())


def test_a_model_alone_cannot_be_resumed(tmp_path):
    trainer = tiny.trainer(tmp_path)
    checkpoint.save_model(tmp_path / "model", trainer.model)
    with pytest.raises(FileNotFoundError, match="cannot be resumed"):
        trainer.resume(tmp_path / "model")


def test_other_parameter_groups_are_refused(saved):
    trainer, folder = saved
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    with pytest.raises(ValueError, match="other parameter groups"):
        checkpoint.load_checkpoint(folder, trainer.model, optimizer)


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not a checkpoint: it will not be overwritten"):
        checkpoint.save_model(tmp_path, tiny.model())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --- whole or absent ---


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    """A folder with one checkpoint "model" in it, and the model."""
    model = tiny.model(seed=1)
    checkpoint.save_model(tmp_path / "disk" / "model", model)
    return tmp_path / "disk" / "model", model


def assert_untouched(old):
    folder, model = old
    assert leftovers(folder.parent) == ["model"]
    assert tiny.bits(checkpoint.load_model(folder)) == tiny.bits(model)


def test_replacing_a_checkpoint(old):
    folder, _ = old
    new = tiny.model(seed=2)
    checkpoint.save_model(folder, new)
    assert_untouched((folder, new))


@pytest.mark.parametrize("call", range(1, 13))
def test_a_full_disk_at_any_moment_leaves_the_old_checkpoint(old, monkeypatch, call):
    """The call-th of the 13 fsyncs and renames finds no space; the last one comes when the new checkpoint stands."""
    with pytest.raises(OSError, match="No space left on device") as error:
        save_with_fault(old[0], monkeypatch, call)
    assert str(old[0]) in str(error.value)
    assert_untouched(old)


def test_there_are_no_more_moments_than_those(old, monkeypatch):
    assert save_with_fault(old[0], monkeypatch, 100) == 13


def save_with_fault(folder: Path, monkeypatch, fault: int) -> int:
    """Saves a checkpoint; the fault-th call of fsync, replace or rename fails. Returns the number of calls."""
    calls = 0

    def counted(real):
        def function(*args):
            nonlocal calls
            calls += 1
            if calls == fault:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return function

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename"):
            patch.setattr(os, name, counted(getattr(os, name)))
        checkpoint.save_model(folder, tiny.model(seed=2))
    return calls


def test_a_limit_on_file_size_leaves_the_old_checkpoint(old):
    """A real failed write, inside safetensors."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large.*model\.safetensors") as error:
            checkpoint.save_model(old[0], tiny.model(seed=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert_untouched(old)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk):
    model = tiny.model(layers=1)
    checkpoint.save_model(small_disk / "model", model)
    with pytest.raises(OSError, match=r"No space left on device: '.*small/model/model\.safetensors'"):
        checkpoint.save_model(small_disk / "model", tiny.model(layers=8))
    assert_untouched((small_disk / "model", model))


@pytest.mark.parametrize("folder", ["/proc/fastgpt", "file/model"])
def test_an_unwritable_place_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("not a folder")
    path = tmp_path / folder  # an absolute right side stands alone
    with pytest.raises(OSError, match=str(path)):
        checkpoint.save_model(path, tiny.model())


def test_a_folder_without_write_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path / "model")):
        checkpoint.save_model(tmp_path / "model", tiny.model())


def test_killed_between_the_two_renames(old, monkeypatch):
    """Nothing else can run after SIGKILL: no clean-up, no second rename."""
    folder, model = old

    class Killed(BaseException):
        pass

    real, renames = os.rename, []

    def rename(source, target):
        if renames:
            raise Killed
        renames.append((source, target))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "rename", rename)
        with pytest.raises(Killed):
            checkpoint.save_model(folder, tiny.model(seed=2))
    with pytest.raises(FileNotFoundError, match=r"model\.previous holds the checkpoint"):
        checkpoint.load_model(folder)
    assert tiny.bits(checkpoint.load_model(folder.with_name("model.previous"))) == tiny.bits(model)
    checkpoint.save_model(folder, model)
    assert_untouched(old)


def test_sigkill_while_saving(tmp_path):
    """A process that saves without pause is killed at many moments: the latest checkpoint is always whole."""
    model = tiny.model(layers=8)
    expected = tiny.bits(model)
    last = 0
    for attempt in range(20):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                save_for_ever(tmp_path, model, last, writing)
            os._exit(1)
        os.close(writing)
        os.read(reading, 1)  # it has saved one
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        saved = 1 + len(os.read(reading, 1000))
        os.close(reading)
        found = checkpoint.find_checkpoint(tmp_path)
        assert checkpoint.step_of(found) in (last + saved, last + saved + 1)  # the last one may not have been told
        last = checkpoint.step_of(found)
        assert tiny.bits(checkpoint.load_model(found)) == expected


def save_for_ever(run: Path, model: torch.nn.Module, step: int, pipe: int) -> None:
    """Saves checkpoint after checkpoint, and writes a byte into ``pipe`` for each."""
    while True:
        step += 1
        checkpoint.save_checkpoint(checkpoint.checkpoint_path(run, step), model, trainer={"step": step})
        os.write(pipe, b".")
