"""A training run of many processes in one folder: each writes its shards, and any number of processes go on from it.

The tensors go through torch.distributed.checkpoint, what else a run needs into a small file beside them. The folder has
two places, written in turn, and `last.json`, which names the one that is whole and is replaced only when all of it is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from attention_zoo.layers.files import remove_leftovers, write_aside
from attention_zoo.training.distributed import World
from attention_zoo.training.optimizer_state import load_optimizer, name_groups, room_for_state, split_state
from attention_zoo.training.parts import check_extra, check_part, describe, part, random_states, set_random_states
from attention_zoo.training.shards import list_shards, read_shards, write_shards

T = TypeVar("T")
FORMAT = "attention_zoo.training.sharded"
VERSION = 1
POINTER = "last.json"
PLACES = ("a", "b")
REST = "rest.pt"
FIELDS = {"optimizer", "schedule", "generator", "random", "extra"}


@dataclass(frozen=True)
class ShardedCheckpoint:
    """What `read_sharded` found.

    Attributes:
        path: the folder.
        step: steps that the run had taken.
        extra: what the caller of `save_sharded` added.
        place: the folder of the shards.
        contents: the schedule, the generator and the random states.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    place: Path
    contents: dict[str, Any]

    def restore(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put a run back where it was; all processes together, as many as there are now.

        A process that has no predecessor of its rank draws its dropout from a new seed; all else is as it was.

        Args:
            model, optimizer, schedule, generator: built just as for the run that was saved.

        Raises:
            ValueError: something does not fit what was saved; the message names the field. All is left as it is then.
        """
        check_part(self.path, self.contents, "optimizer", optimizer)
        check_part(self.path, self.contents, "schedule", schedule)
        check_part(self.path, self.contents, "generator", generator)
        found = list_shards(self.place)
        self._check_weights(model, found)
        saved, groups = self.contents["optimizer"]["state"], name_groups(model, optimizer)
        self._check_groups(saved["names"], groups)
        weights, state = model.state_dict(), room_for_state(model, _below("optimizer.", found))
        read_shards(self.place, {"model": weights, "optimizer": state})
        model.load_state_dict(weights)
        for name, values in saved["values"].items():
            state.setdefault(name, {}).update(values)
        load_optimizer(optimizer, groups, state, saved["settings"])
        if schedule is not None:
            schedule.load_state_dict(deepcopy(self.contents["schedule"]["state"]))
        if generator is not None:
            generator.set_state(self.contents["generator"]["state"])
        set_random_states(self.contents["random"], World.current().rank)

    def load_weights(self, model: nn.Module) -> None:
        """Load the model alone, to convert it, say: a plain one then saves itself as ever. All processes together.

        Raises:
            ValueError: another model was saved; the message names the first tensor that does not fit.
        """
        self._check_weights(model, list_shards(self.place))
        weights = model.state_dict()
        read_shards(self.place, {"model": weights})
        model.load_state_dict(weights)

    def _check_weights(self, model: nn.Module, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        wanted, found = model.state_dict(), _below("model.", found)
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                raise ValueError(f"{self.path} lacks {name!r}, which this model has")
            if name not in wanted:
                raise ValueError(f"{self.path} holds {name!r}, which this model has not")
            want, got = describe(wanted[name]), f"{found[name][0]} {found[name][1]}"
            if want != got:
                raise ValueError(f"{self.path} must hold {want} as {name!r}, got {got}")

    def _check_groups(self, saved: list[list[str]], groups: list[list[str]]) -> None:
        want, got = [len(names) for names in groups], [len(names) for names in saved]
        if want != got:
            raise ValueError(f"{self.path}: field 'optimizer' must have groups of {want} parameters, got {got}")
        for wanted, found in zip(itertools.chain(*groups), itertools.chain(*saved), strict=True):
            if wanted != found:
                raise ValueError(f"{self.path}: field 'optimizer' must have {wanted!r} where it has {found!r}")


def _below(prefix: str, found: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def save_sharded(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    schedule: LRScheduler | None = None,
    generator: torch.Generator | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a training run to a folder, every process its shards; all processes together.

    What was saved last stays whole until this is, whenever a process may be killed or the disk be full.

    Args:
        path: the folder; made where it is missing.
        model: the model itself, not what DDP wraps around it.
        optimizer, schedule, generator, step, extra: see `save_checkpoint`.

    Raises:
        TypeError: a value of extra cannot be written; nothing is written then.
        OSError: a process could not write; all raise.
    """
    world = World.current()
    folder = Path(path)
    for name, value in (extra or {}).items():
        check_extra(name, value)
    tensors, values = split_state(model, optimizer)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    state = {"names": name_groups(model, optimizer), "values": values, "settings": settings}
    contents = {
        "optimizer": part(optimizer, state),
        "schedule": None if schedule is None else part(schedule, schedule.state_dict()),
        "generator": None if generator is None else part(generator, generator.get_state()),
        "random": _gather(world, random_states()),
        "extra": dict(extra or {}),
    }
    place: Path = world.once(lambda: _make_place(folder))
    write_shards(place, {"model": model.state_dict(), "optimizer": tensors})
    world.once(lambda: _finish(place, contents, step))


def _make_place(folder: Path) -> Path:
    """The place that `last.json` does not name, emptied."""
    try:
        last = _read_pointer(folder)["place"]
    except (FileNotFoundError, ValueError):
        last = None
    place = folder / next(name for name in PLACES if name != last)
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    return place


def _finish(place: Path, contents: dict[str, Any], step: int) -> None:
    """Write what is not in the shards, then say that all is whole."""
    write_aside(place / REST, lambda aside: torch.save(contents, aside))
    pointer = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "place": place.name,
        "files": {file.name: _digest(file) for file in sorted(place.iterdir())},
    }
    path = place.parent / POINTER
    remove_leftovers(path)
    write_aside(path, lambda aside: Path(aside).write_text(json.dumps(pointer, indent=2) + "\n"))


def read_sharded(path: str | os.PathLike[str]) -> ShardedCheckpoint:
    """Read what `save_sharded` wrote, in any number of processes. Nothing in the files is executed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is damaged or missing, or the folder is something else.
    """
    folder = Path(path)
    pointer = _read_pointer(folder)
    place = folder / pointer["place"]
    world = World.current()
    # Each process reads some of the files; what one finds, all must know.
    mine = list(pointer["files"].items())[world.rank :: world.size]
    complaints = _gather(world, [_complaint(place / name, digest) for name, digest in mine])
    for complaint in itertools.chain(*complaints):
        if complaint is not None:
            raise ValueError(complaint)
    contents = _read_rest(place / REST)
    return ShardedCheckpoint(folder, pointer["step"], contents["extra"], place, contents)


def _read_rest(path: Path) -> dict[str, Any]:
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a file that was tampered with can break the readers in any way
        raise ValueError(f"{path} must be what save_sharded wrote, but it cannot be read") from error
    if not isinstance(contents, dict) or not contents.keys() >= FIELDS:
        raise ValueError(f"{path} must hold {', '.join(sorted(FIELDS))}")
    return contents


def _complaint(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return f"{path} must be there, since {POINTER} names it, but it is missing"
    if _digest(path) != digest:
        return f"{path} must be as it was written, but its checksum is another: it is damaged"
    return None


def _read_pointer(folder: Path) -> dict[str, Any]:
    path = folder / POINTER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        pointer = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(pointer, dict) or pointer.get("format") != FORMAT:
        raise ValueError(f"{path} must belong to a sharded checkpoint, but it holds something else")
    rules: dict[str, Callable[[Any], bool]] = {
        "version": lambda value: value == VERSION,
        "step": lambda value: isinstance(value, int),
        "place": lambda value: value in PLACES,
        "files": lambda value: isinstance(value, dict) and {".metadata", REST} <= value.keys(),
    }
    for field, rule in rules.items():
        if not rule(pointer.get(field)):
            raise ValueError(f"{path}: field {field!r} must be as it was written, got {pointer.get(field)!r}")
    return pointer


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gather(world: World, value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
