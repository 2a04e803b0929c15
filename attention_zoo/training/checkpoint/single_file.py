"""Checkpoints of single-process training: one file, replaced atomically."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from attention_zoo.training.distributed import World, is_sharded, spread
from attention_zoo.training.random_state import random_state, set_random_state

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
    write_file(Path(path), TrainingState(model, optimizer, schedule, generator).to_save(step, extra))


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of `save_checkpoint`. No code in the file is executed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or not a checkpoint.
    """
    contents = read_file(Path(path))
    return Checkpoint(Path(path), contents["step"], contents["extra"], contents)


@dataclass(frozen=True)
class TrainingState:
    """The objects of a training run that have a state.

    The optimizer's state is kept by parameter name: it depends neither on the order of the parameters nor on how they
    are sharded. (`get_optimizer_state_dict` of torch.distributed.checkpoint does the same, but takes an optimizer step
    if there is no state yet, which changes the run.)

    Args:
        model, optimizer, schedule, generator: see `save_checkpoint`.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler | None = None
    generator: torch.Generator | None = None

    def contents(self) -> dict[str, Any]:
        """The contents of a checkpoint. Tensors are shared with the run, except those of the generators.

        Raises:
            ValueError: the optimizer has a parameter that is not in the model's state_dict.
        """
        state, groups = self.optimizer.state_dict(), self.group_names()
        names = list(chain(*groups))
        return {
            "classes": {part: type(getattr(self, part)).__name__ for part in ("optimizer", "schedule", "generator")},
            "model": self.model.state_dict(),
            "optimizer": {names[index]: values for index, values in state["state"].items()},
            "groups": [{**group, "params": own} for group, own in zip(state["param_groups"], groups, strict=True)],
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
            "random": [random_state()],
        }

    def to_save(self, step: int, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """`contents` with `step` and `extra`, checked to be readable with `weights_only=True`.

        Raises:
            TypeError: `step` is not an int of at least 0, or a value is not readable.
            ValueError: see `contents`.
        """
        if type(step) is not int or step < 0:
            raise TypeError(f"step must be an int of at least 0, got {step!r}")
        contents = {**self.contents(), "step": step, "extra": dict(extra or {})}
        for field in ("extra", "optimizer", "groups", "schedule"):
            check_readable(field, contents[field])
        return contents

    def load(self, contents: Mapping[str, Any]) -> None:
        """Load contents that `check_fit` accepted. The optimizer keeps the tensors of its state."""
        if self.schedule is not None:
            self.schedule.load_state_dict(deepcopy(contents["schedule"]))
        weights, groups = self.model.state_dict(), self.group_names()
        self.model.load_state_dict({name: spread(value, weights[name]) for name, value in contents["model"].items()})
        index = {name: k for k, name in enumerate(chain(*groups))}
        state = {}
        for name, values in contents["optimizer"].items():
            state[index[name]] = tree_map_only(Tensor, partial(spread, like=weights[name]), values)
        settings = zip(deepcopy(contents["groups"]), groups, strict=True)
        param_groups = [{**group, "params": [index[name] for name in names]} for group, names in settings]
        self.optimizer.load_state_dict({"state": state, "param_groups": param_groups})
        if self.generator is not None:
            self.generator.set_state(contents["generator"])
        states, rank = contents["random"], World.current().rank
        set_random_state(states[rank if rank < len(states) else 0])
        if rank >= len(states):  # a rank that the saved run did not have must draw its own dropout
            torch.manual_seed(int(torch.randint(2**62, ())) + rank)

    def group_names(self) -> list[list[str]]:
        """Names of the parameters in each group of the optimizer.

        Raises:
            ValueError: the optimizer has a parameter that is not in the model's state_dict.
        """
        # FSDP reshards when asked for a state_dict. Of the names of a shared parameter the first one is used.
        entries = reversed(self.model.state_dict(keep_vars=True).items())
        names = {value: name for name, value in entries if isinstance(value, nn.Parameter)}
        try:
            return [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]
        except KeyError:
            raise ValueError("optimizer must have the model's parameters, sharded but not tensor-parallel") from None


def check_fit(path: Path, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Check that saved contents can be loaded into the run whose own contents are given.

    Raises:
        ValueError: they cannot; the message names the field.
    """
    try:
        want, got = outline(own), outline(saved)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is malformed: {error!r}") from error
    for field in want | got:
        if want.get(field) != got.get(field):
            raise ValueError(f"{path}: {field} must be {want.get(field)}, got {got.get(field)}")


def outline(contents: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that it is loaded into, by field."""
    fields = {f"class of {field}": name for field, name in contents["classes"].items()}
    fields |= {f"model[{name!r}]": describe(value) for name, value in contents["model"].items()}
    groups = {name: index for index, group in enumerate(contents["groups"]) for name in group["params"]}
    fields |= {f"group of {name!r} in the optimizer": index for name, index in groups.items()}
    fields["number of groups in the optimizer"] = len(contents["groups"])
    for name, values in contents["optimizer"].items():
        fields |= {f"optimizer[{name!r}]": "unknown" for _ in values.items() if name not in groups}
    schedule = contents["schedule"] or {}
    fields["schedule"] = sorted(schedule), [sorted(part) for part in schedule.get("_schedulers", ())]
    fields["generator"] = describe(contents["generator"])
    fields["random"] = {describe(state["cpu"]) for state in contents["random"]}
    return fields


def describe(value: object) -> str:
    """Dtype and shape of a tensor; the type of another value."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_readable(field: str, value: object) -> None:
    """Check that a value can be saved and then read with `weights_only=True`.

    Raises:
        TypeError: it cannot.
    """
    buffer = io.BytesIO()
    try:
        torch.save(tree_map_only(Tensor, lambda _: None, value), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickling can raise any exception
        raise TypeError(f"{field} must be made of numbers, strings, lists, dicts and tensors, got {value!r}") from error


def write_file(path: Path, contents: Mapping[str, Any]) -> None:
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


def read_file(path: Path) -> dict[str, Any]:
    """Read a file of `write_file`.

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
        raise ValueError(f"{path} must be a checkpoint, but cannot be read") from error
    if damaged or not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{path} must be an undamaged checkpoint of the format {FORMAT}")
    if missing := FIELDS - contents.keys():
        raise ValueError(f"{path} must have the fields {missing}, which are missing")
    return contents
