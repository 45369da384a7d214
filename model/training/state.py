"""Checkpoints of a run in progress: a kill at any moment leaves the last complete one.

OUTPUT/state/step-00000100/
    model.safetensors      parameters and buffers
    average.safetensors    their running average
    optimizer.safetensors  the two moments and the step count of every trained parameter
    state.json             what else the loop counts

A folder is written under another name, flushed to the disk, then renamed, which is atomic. No random state is
kept: the loop seeds every step by its number.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from gemini.errors import CheckpointError

_FINISHED = re.compile(r"step-(\d{8})")


@dataclass
class Progress:
    """What the loop knows beside tensors: steps done, seconds spent, validation results so far."""

    step: int = 0
    elapsed: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, by name; tied weights come under their first name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in named.items()}


def copy_tensors(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Overwrite ``target`` in place; CheckpointError when the names or shapes are not the same."""
    if target.keys() != source.keys() or any(target[name].shape != source[name].shape for name in target):
        raise CheckpointError(
            "The saved state belongs to another model.",
            "Resume with the recipe that the run was started with.",
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state under the names of the parameters, e.g. ``head.weight/exp_avg``."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``."""
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                f"The saved state names an unknown weight {name}.",
                "Resume with the recipe that the run was started with.",
            )
        parameter = parameters[name]
        if value.shape == parameter.shape:
            # The fused step walks weights and moments in memory order: both are channels_last, or neither.
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value


def save_state(
    folder: Path, progress: Progress, parts: Mapping[str, Mapping[str, torch.Tensor]], *, keep: int = 1
) -> Path:
    """Write one checkpoint below ``folder`` and remove all but the ``keep`` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, tensors in parts.items():
            write_tensors(partial / f"{name}.safetensors", tensors)
        write_atomically(partial / "state.json", json.dumps(asdict(progress)).encode())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in finished_states(folder)[:-keep]:
        shutil.rmtree(path)
    return final


def finished_states(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _FINISHED.fullmatch(path.name))


def load_state(path: Path) -> tuple[Progress, dict[str, dict[str, torch.Tensor]]]:
    """Inverse of ``save_state``."""
    try:
        progress = Progress(**json.loads((path / "state.json").read_text(encoding="utf-8")))
        parts = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    except Exception as error:
        raise CheckpointError(
            f"The saved state {path} cannot be read ({error}).", "Remove that folder, or start a new run."
        ) from error
    return progress, parts


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, whole or not at all.

    Not `save_file`, which hides the errno of a full disk.
    """
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Inverse of ``write_tensors``."""
    return load_file(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, wait until it is on the disk, then take the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
