"""Checkpoints of single-process training: one file, replaced atomically."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from attention_zoo.training.checkpoint.state import TrainingState, check_fit
from attention_zoo.training.distributed import is_sharded

FORMAT = "attention_zoo.training.checkpoint.2"
PARTIAL = ".attention_zoo-partial"  # suffix of a file that is being written
FIELDS = {"classes", "model", "optimizer", "groups", "schedule", "generator", "random", "step", "extra"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read by `read_checkpoint`.

    Attributes:
        path: the file.
        step: number of steps taken.
        extra: the `extra` of `save_checkpoint`.
        contents: all contents of the file.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    contents: dict[str, Any]

    def restore(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Restore a training run, including torch's default random number generators.

        Args:
            model, optimizer, schedule, generator: constructed as in the saved run; the model may be sharded.

        Raises:
            ValueError: an object does not fit the checkpoint. Nothing is changed then.
        """
        state = TrainingState(model, optimizer, schedule, generator)
        check_fit(self.path, state.contents(), self.contents)
        state.load(self._to_load(model))

    def _to_load(self, model: nn.Module) -> dict[str, Any]:
        """The contents, with tensors that the optimizer may keep and change."""
        return {**self.contents, "optimizer": deepcopy(self.contents["optimizer"])}


def save_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    schedule: LRScheduler | None = None,
    generator: torch.Generator | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save a training run to one file, which is replaced atomically.

    If the process is killed or the disk is full, the previous checkpoint remains.

    Args:
        path: the file; missing parent directories are created.
        model, optimizer, schedule: objects whose `state_dict` is saved.
        step: number of steps taken.
        generator: the random number generator of the data. Torch's default generators are always saved.
        extra: further values by name: numbers, strings, lists, dicts and tensors.

    Raises:
        TypeError: a value of `extra`, or of the state of the optimizer or the schedule, has another type (a numpy
            number or a path, for example). Nothing is written then.
        ValueError: the model is sharded (use `save_sharded`), or the optimizer is not that of the model.
        OSError: the file could not be written.
    """
    if is_sharded(model):
        raise ValueError("model must not be sharded: use save_sharded")
    write_contents(Path(path), TrainingState(model, optimizer, schedule, generator).to_save(step, extra))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of `save_checkpoint`. No code in the file is executed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a checkpoint.
    """
    contents = read_contents(Path(path))
    return Checkpoint(Path(path), contents["step"], contents["extra"], contents)


def write_contents(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a file next to `path`, then rename it to `path`.

    Raises:
        OSError: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")  # a fixed name, so the next save overwrites a leftover
    try:
        torch.save({**contents, "format": FORMAT}, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except RuntimeError as error:  # of torch's writer if the disk is full
        raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_contents(path: Path) -> dict[str, Any]:
    """Read a file of `write_contents`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, not a checkpoint, or a field is missing or malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None  # torch.load does not verify checksums
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        raise ValueError(f"{path} must be a whole checkpoint, but cannot be read") from error
    if damaged:
        raise ValueError(f"{path} must be a whole checkpoint, but a checksum is wrong")
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of the format {FORMAT}, but is not")
    if missing := FIELDS - contents.keys():
        raise ValueError(f"{path} must have the fields {missing}, which are missing")
    return contents
