"""Checkpoints: folders of safetensors and JSON, written whole or not at all, and read only if every byte is right.

    model.safetensors      the parameters, in their own dtype
    config.json            GPTConfig
    tokenizer files        what ``Tokenizer.save`` writes
    optimizer.safetensors  the optimizer's tensors (fp32 master weights and moments), by parameter name
    trainer.json           step, random state, position in the data, metrics, versions, the optimizer's numbers
    checksums.json         size and SHA-256 of each of the above; a folder without it is no checkpoint

The optimizer's file and trainer.json are there only to resume training. A run keeps its checkpoints as
``RUN/checkpoints/step-00000100``; wherever a checkpoint is asked for, ``RUN`` or ``RUN/latest`` mean its last one and
``RUN/best`` the one with the lowest validation loss. Nothing here reads or writes pickle.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgpt.files import atomic_folder, read_json, write_json
from fastgpt.model import GPT, GPTConfig

if TYPE_CHECKING:
    from fastgpt.tokenizers import Tokenizer

MODEL = "model.safetensors"
CONFIG = "config.json"
OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"
CHECKSUMS = "checksums.json"
CHECKPOINTS = "checkpoints"  # the folder in a run that holds them

_FORMAT = "fastgpt checkpoint 1"
_STEP = re.compile(r"step-(\d{8,})")


# --- writing ---


def save_model(folder: str | os.PathLike[str], model: GPT, tokenizer: Tokenizer | None = None) -> Path:
    """Writes the model, and the tokenizer if given, as a checkpoint without training state; see ``save_checkpoint``."""
    return save_checkpoint(folder, model, tokenizer=tokenizer)


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: GPT,
    *,
    tokenizer: Tokenizer | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint, atomically: whatever fails, ``folder`` is the old checkpoint or the whole new one.

    Args:
        folder: the checkpoint's own folder; one that exists must be a checkpoint and is replaced.
        model: its parameters are written in their own dtype, bit for bit.
        tokenizer: written beside the model, so that the folder suffices to generate.
        optimizer: its state; every parameter must be one of the model's.
        trainer: anything JSON can hold, kept in trainer.json.

    Raises:
        OSError: the folder cannot be written (a full disk, no permission); names the path.
        ValueError: ``folder`` exists and is not a checkpoint; ``trainer`` holds what JSON cannot.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CHECKSUMS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a checkpoint: it will not be overwritten; choose another folder")
    with atomic_folder(folder) as new:
        write_json(new / CONFIG, model.config.to_dict())
        _write_tensors(new / MODEL, model.state_dict())
        if tokenizer is not None:
            tokenizer.save(new)
        numbers: dict[str, Any] = dict(trainer or {})
        if optimizer is not None:
            tensors, numbers["optimizer"] = _pack_optimizer(model, optimizer)
            _write_tensors(new / OPTIMIZER, tensors)
        if numbers:
            write_json(new / TRAINER, numbers)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(new.iterdir())}
        write_json(new / CHECKSUMS, {"format": _FORMAT, "files": files})
    return folder


def _pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors as "parameter.key", and all else that its state_dict holds, as JSON."""
    names = _names_by_index(model, optimizer)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{names[index]}.{key}"] = value
            else:
                values.setdefault(names[index], {})[key] = value
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]]
    return tensors, {"param_groups": groups, "values": values}


def _names_by_index(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters in the order in which its state_dict counts them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it reports a full disk in words of its own
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    shutil.copymode(path.with_name(CONFIG), path)  # safetensors makes files that only their owner may read


# --- finding ---


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The checkpoint folder that ``path`` means: itself, or one of a run: ``RUN`` and ``RUN/latest``, or ``RUN/best``.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    path = Path(path)
    if (path / CHECKSUMS).is_file():
        return path
    run, which = (path.parent, path.name) if path.name in ("latest", "best") and not path.exists() else (path, "latest")
    checkpoints = list_checkpoints(run)
    if checkpoints:
        return best_checkpoint(run) if which == "best" else checkpoints[-1]
    if not path.exists() and run == path:
        aside = path.with_name(f"{path.name}.previous")  # atomic_folder was killed between its two renames
        also = f"; {aside} holds the checkpoint that it was about to replace" if aside.exists() else ""
        raise FileNotFoundError(f"no checkpoint {path}: there is no such folder{also}")
    raise FileNotFoundError(
        f"no checkpoint in {run}: it holds neither {CHECKSUMS} (a checkpoint) nor {CHECKPOINTS}/step-... (a run)"
    )


def list_checkpoints(run: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run by step; one is renamed to such a name only when it is complete."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name) and (path / CHECKSUMS).is_file()]
    return sorted(found, key=step_of)


def best_checkpoint(run: str | os.PathLike[str]) -> Path:
    """The checkpoint of a run with the lowest validation loss, the earlier of equals.

    Raises:
        FileNotFoundError: the run has no checkpoint with a validation loss.
    """
    losses = {}
    for path in list_checkpoints(run):
        loss = read_json(path / TRAINER).get("validation_loss")
        if loss is not None:
            losses[path] = loss
    if not losses:
        raise FileNotFoundError(f"{run} has no checkpoint with a validation loss, so none is the best; take the latest")
    return min(losses, key=losses.__getitem__)


def checkpoint_path(run: str | os.PathLike[str], step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / CHECKPOINTS / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a run's checkpoint."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint} is not named like a run's checkpoint, step-00000100")
    return int(match[1])


def remove_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint; first the file that makes it one, so that no half of it can be taken for the whole."""
    (checkpoint / CHECKSUMS).unlink()
    shutil.rmtree(checkpoint)


def remove_unfinished(run: str | os.PathLike[str]) -> None:
    """Deletes what processes that were killed while saving have left; none may be saving into ``run`` now."""
    for folder in (Path(run) / CHECKPOINTS).glob(".step-*.tmp"):
        shutil.rmtree(folder)


# --- reading ---


def load_model(
    path: str | os.PathLike[str],
    ops: str | Mapping[str, str] = "fused",
    *,
    device: torch.device | str | None = None,
) -> GPT:
    """The model of a checkpoint, in evaluation mode, its parameters in the dtype that they were saved in, bit for bit.

    Args:
        path: a checkpoint, or a run (see ``find_checkpoint``).
        ops: which operators the model uses, as for ``GPT``.
        device: where to put it; by default the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file of it is missing, truncated or corrupt, or does not fit its config.json (names it).
    """
    folder = find_checkpoint(path)
    verify_checkpoint(folder)
    model = GPT(read_config(folder), ops=ops, device="meta")
    tensors = _read_tensors(folder / MODEL)
    _check_same_tensors(folder / MODEL, tensors, model.state_dict(), dtype=False)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def load_checkpoint(
    path: str | os.PathLike[str], model: GPT, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Puts a checkpoint's parameters into ``model`` and its optimizer state into ``optimizer``; returns trainer.json.

    Nothing is changed unless all of it fits.

    Raises:
        FileNotFoundError: there is no checkpoint, or none with training state though ``optimizer`` is given.
        ValueError: a file is missing, truncated or corrupt; the checkpoint is of a model with another config (lists
            the fields that differ), of another dtype, or of an optimizer with other parameter groups.
    """
    folder = find_checkpoint(path)
    verify_checkpoint(folder)
    _check_same_config(folder, read_config(folder), model.config)
    tensors = _read_tensors(folder / MODEL)
    _check_same_tensors(folder / MODEL, tensors, model.state_dict(), dtype=True)
    trainer = read_json(folder / TRAINER) if (folder / TRAINER).is_file() else {}
    if optimizer is not None:
        if "optimizer" not in trainer:
            raise FileNotFoundError(f"{folder} holds a model but no training state ({OPTIMIZER}): it cannot be resumed")
        state = _unpack_optimizer(folder, model, optimizer, trainer["optimizer"])
        optimizer.load_state_dict(state)
    model.load_state_dict(tensors)
    return trainer


def read_config(folder: Path) -> GPTConfig:
    """The model's config in a checkpoint; ValueError says what of it this version does not know."""
    try:
        return GPTConfig.from_dict(read_json(folder / CONFIG))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def verify_checkpoint(folder: Path) -> None:
    """Reads every byte of a checkpoint; ValueError names the files that are not what was written."""
    description = read_json(folder / CHECKSUMS)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{folder / CHECKSUMS} does not describe a checkpoint: it has no format {_FORMAT!r}")
    problems = []
    for name, expected in description["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            problems.append(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
        elif _sha256(path) != expected["sha256"]:
            problems.append(f"{name} is corrupt (its SHA-256 is not the one written)")
    if problems:
        earlier = _earlier(folder)
        raise ValueError(
            f"checkpoint {folder} is damaged: {'; '.join(problems)}"
            + (f". The one before it is {earlier}" if earlier else "")
        )


def _earlier(checkpoint: Path) -> Path | None:
    if not _STEP.fullmatch(checkpoint.name):
        return None
    before = [path for path in list_checkpoints(checkpoint.parent.parent) if step_of(path) < step_of(checkpoint)]
    return before[-1] if before else None


def _check_same_config(folder: Path, theirs: GPTConfig, ours: GPTConfig) -> None:
    there, here = theirs.to_dict(), ours.to_dict()
    differing = [
        f"{name} is {there[name]!r} there and {here[name]!r} here" for name in here if there[name] != here[name]
    ]
    if differing:
        raise ValueError(f"checkpoint {folder} is of a model with another config: {'; '.join(differing)}")


def _check_same_tensors(path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor], *, dtype: bool) -> None:
    problems = [f"it lacks {name}" for name in sorted(ours.keys() - theirs.keys())]
    problems += [f"it has {name}, which the model has not" for name in sorted(theirs.keys() - ours.keys())]
    for name in ours.keys() & theirs.keys():
        if theirs[name].shape != ours[name].shape:
            problems.append(f"{name} has shape {tuple(theirs[name].shape)}, the model's {tuple(ours[name].shape)}")
        elif dtype and theirs[name].dtype != ours[name].dtype:
            problems.append(f"{name} is {theirs[name].dtype}, the model's {ours[name].dtype}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{path} does not fit the model: {shown}")


def _unpack_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> dict[str, Any]:
    """The optimizer's state_dict as it was when ``_pack_optimizer`` took it apart."""
    index_of = {name: index for index, name in enumerate(_names_by_index(model, optimizer))}
    current = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    if [[index_of.get(name) for name in group["params"]] for group in groups] != [group["params"] for group in current]:
        raise ValueError(f"{folder / TRAINER}: the optimizer was saved with other parameter groups than this one has")
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in _read_tensors(folder / OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(index_of[parameter], {})[key] = tensor
    for parameter, values in saved["values"].items():
        state.setdefault(index_of[parameter], {}).update(values)
    restored = []
    for group, now in zip(groups, current, strict=True):
        as_tuples = {key: tuple(value) for key, value in group.items() if isinstance(now.get(key), tuple)}
        restored.append({**group, **as_tuples, "params": now["params"]})
    return {"state": state, "param_groups": restored}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own (not mapped: the file may be deleted or replaced)."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
