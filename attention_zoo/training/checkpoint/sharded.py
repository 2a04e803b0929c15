"""A training run of many processes in one folder: each writes its shards, and any number of processes go on from it.

The tensors go through torch.distributed.checkpoint, what else a run needs into a small file beside them. The folder has
two places, written in turn, and `last.json`, which names the one that is whole and is replaced only when all of it is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from attention_zoo.training.checkpoint.optimizer_state import load_optimizer, name_groups, room_for_state, split_state
from attention_zoo.training.checkpoint.parts import (
    check_group_sizes,
    check_parts,
    check_run,
    check_weights,
    load_schedule,
    pack,
    random_states,
    set_random_states,
)
from attention_zoo.training.checkpoint.shard_folder import (
    find_damage,
    finish_place,
    make_place,
    read_pointer,
    read_rest,
)
from attention_zoo.training.checkpoint.shards import list_shards, read_shards, write_shards
from attention_zoo.training.distributed import World

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedCheckpoint:
    """What `read_sharded` found.

    Attributes:
        path: the folder.
        step: steps that the run had taken.
        extra: what the caller of `save_sharded` added.
        place: the folder of the shards.
        contents: the schedule, the generator and the random states.
        pointer: what `last.json` said.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    place: Path
    contents: dict[str, Any]
    pointer: dict[str, Any]

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
            ValueError: something does not fit what was saved, and the message names the field; or another checkpoint
                was saved there since this one was read. The model and the optimizer are left as they are then.
        """
        self._check_fresh()
        check_parts(self.path, self.contents, self.contents["random"], optimizer, schedule, generator)
        found = list_shards(self.place)
        self._check_weights(model, found)
        saved, groups = self.contents["optimizer"]["state"], name_groups(model, optimizer)
        self._check_groups(saved, groups)
        if schedule is not None:
            load_schedule(self.path, schedule, self.contents["schedule"]["state"])
        weights, state = model.state_dict(), room_for_state(model, _below("optimizer.", found))
        read_shards(self.place, {"model": weights, "optimizer": state})
        model.load_state_dict(weights)
        for name, values in saved["values"].items():
            state.setdefault(name, {}).update(values)
        load_optimizer(optimizer, groups, state, saved["settings"])
        if generator is not None:
            generator.set_state(self.contents["generator"]["state"])
        set_random_states(self.contents["random"], World.current().rank)

    def load_weights(self, model: nn.Module) -> None:
        """Load the model alone, to convert it, say: a plain one then saves itself as ever. All processes together.

        Raises:
            ValueError: another model was saved, and the message names the first tensor that does not fit; or another
                checkpoint was saved there since this one was read.
        """
        self._check_fresh()
        self._check_weights(model, list_shards(self.place))
        weights = model.state_dict()
        read_shards(self.place, {"model": weights})
        model.load_state_dict(weights)

    def _check_fresh(self) -> None:
        """What was read and what is there must be one checkpoint."""
        if read_pointer(self.path) != self.pointer:
            raise ValueError(
                f"{self.path} must be read again: another checkpoint was saved there since step {self.step}"
            )

    def _check_weights(self, model: nn.Module, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        kinds = {name: f"{dtype} {shape}" for name, (dtype, shape) in _below("model.", found).items()}
        check_weights(str(self.path), model, kinds)

    def _check_groups(self, saved: Mapping[str, Any], groups: list[list[str]]) -> None:
        check_group_sizes(self.path, groups, saved["names"])
        if len(saved["settings"]) != len(groups):
            raise ValueError(f"{self.path}: field 'optimizer' must have settings of {len(groups)} groups")
        names = list(itertools.chain(*groups))
        for wanted, found in zip(names, itertools.chain(*saved["names"]), strict=True):
            if wanted != found:
                raise ValueError(f"{self.path}: field 'optimizer' must have {wanted!r} where it has {found!r}")
        for name in saved["values"]:
            if name not in names:
                raise ValueError(f"{self.path}: field 'optimizer' has values for {name!r}, which it has not")


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
        path: the folder, which all processes see; made where it is missing.
        model: the model itself, not what DDP wraps around it.
        optimizer, schedule, generator, step, extra: see `save_checkpoint`.

    Raises:
        TypeError: see `save_checkpoint`.
        ValueError: there is something of somebody else's in the place where the shards go.
        OSError: a process could not write; all raise.
    """
    world = World.current()
    folder = Path(path)
    check_run(step, extra, optimizer, schedule)
    tensors, values = split_state(model, optimizer)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    state = {"names": name_groups(model, optimizer), "values": values, "settings": settings}
    contents = pack(optimizer, state, schedule, generator, world.gather(random_states()), extra)
    place: Path = world.once(lambda: make_place(folder))
    write_shards(place, {"model": model.state_dict(), "optimizer": tensors})
    world.once(lambda: finish_place(place, contents, step))


def read_sharded(path: str | os.PathLike[str]) -> ShardedCheckpoint:
    """Read what `save_sharded` wrote, in any number of processes. Nothing in the files is executed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is damaged or missing, or the folder is something else.
    """
    folder = Path(path)
    pointer = read_pointer(folder)
    place = folder / pointer["place"]
    world = World.current()
    # Each process reads some of the files; what one finds, all must know.
    mine = list(pointer["files"].items())[world.rank :: world.size]
    complaints = world.gather([find_damage(place / name, digest) for name, digest in mine])
    for complaint in itertools.chain(*complaints):
        if complaint is not None:
            raise ValueError(complaint)
    contents = read_rest(place)
    return ShardedCheckpoint(folder, pointer["step"], contents["extra"], place, contents, pointer)
