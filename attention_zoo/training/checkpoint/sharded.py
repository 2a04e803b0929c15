"""Checkpoints of distributed training: a directory, to which every rank writes its shards.

Tensors are written by torch.distributed.checkpoint to one of two subdirectories in turn. `run.pt` contains all other
state and the name of the complete subdirectory; it is replaced atomically after the shards are written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from attention_zoo.training.checkpoint.single_file import Checkpoint, TrainingState, check_fit, read_file, write_file
from attention_zoo.training.distributed import World
from attention_zoo.training.random_state import random_state

RUN = "run.pt"
PLACES = ("shards_a", "shards_b")
SHARD = re.compile(r"\.metadata(\.tmp)?|__\d+_\d+\.distcp")


class ShardedCheckpoint(Checkpoint):
    """A checkpoint read by `read_sharded`, for any number of processes. `restore` is collective.

    A rank that the saved run did not have draws its dropout from a new seed. ValueError is also raised if the
    checkpoint was overwritten since it was read.

    Attributes:
        path: the directory.
        step, extra: see `Checkpoint`.
        contents: contents of `run.pt`, with tensors of the model and the optimizer on the meta device.
    """

    def load_weights(self, model: nn.Module) -> None:
        """Load only the weights of the model. Collective.

        Raises:
            ValueError: the weights do not fit the model, or the checkpoint was overwritten since it was read. The model
                is unchanged then.
        """
        check_fit(self.path, {**self.contents, "model": model.state_dict()}, self.contents)
        model.load_state_dict(self._to_load(model, "model")["model"])

    def _to_load(self, model: nn.Module, *fields: str) -> dict[str, Any]:
        from attention_zoo.training.checkpoint.shards import read_tensors

        if read_run(self.path)["files"] != self.contents["files"]:
            raise ValueError(f"{self.path} must be read again: it was overwritten since step {self.step} was read")
        weights, contents = model.state_dict(), dict(self.contents)

        def allocate(meta: Tensor, like: Tensor) -> Tensor:
            """An uninitialized tensor, sharded like the parameter if it has the shape of the parameter."""
            same = meta.shape == like.shape
            return torch.empty_like(like, dtype=meta.dtype) if same else torch.empty(meta.shape, dtype=meta.dtype)

        for field in fields or ("model", "optimizer"):
            contents[field] = {
                name: tree_map_only(Tensor, partial(allocate, like=weights[name]), values)
                for name, values in self.contents[field].items()
            }
        read_tensors(self.path / contents["place"], tensors_by_name(contents))
        return contents


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
    """Save a training run to a directory, each rank its shards. Collective.

    If a process is killed or the disk is full, the previous checkpoint remains.

    Args:
        path: the directory, on a file system shared by all ranks; created if missing.
        model: the model itself, not wrapped in `DistributedDataParallel`.
        optimizer, schedule, generator, step, extra: see `save_checkpoint`.

    Raises:
        TypeError: see `save_checkpoint`.
        ValueError: the optimizer is not that of the model.
        OSError: a rank could not write; raised on all ranks.
    """
    from attention_zoo.training.checkpoint.shards import write_tensors

    world, folder = World.current(), Path(path)
    contents = TrainingState(model, optimizer, schedule, generator).to_save(step, extra)
    contents["random"] = world.gather(random_state())
    tensors = tensors_by_name(contents)
    meta = {field: contents[field] for field in ("model", "optimizer")}
    contents |= tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), meta)
    place: Path = world.once(lambda: _empty_place(folder))
    write_tensors(place, tensors)

    def finish() -> None:
        files = {file.name: _digest(file) for file in place.iterdir() if SHARD.fullmatch(file.name)}
        write_file(folder / RUN, {**contents, "place": place.name, "files": files})

    world.once(finish)


def read_sharded(path: str | os.PathLike[str]) -> ShardedCheckpoint:
    """Read a checkpoint of `save_sharded` on any number of processes. Collective. No code in the files is executed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is missing, damaged or not of a checkpoint.
    """
    folder, world = Path(path), World.current()
    contents = read_run(folder)
    own = list(contents["files"].items())[world.rank :: world.size]  # each rank verifies some of the files
    damaged = [name for name, digest in own if _digest(folder / contents["place"] / name) != digest]
    for name in chain(*world.gather(damaged)):
        raise ValueError(f"{folder / contents['place'] / name} is missing or damaged")
    return ShardedCheckpoint(folder, contents["step"], contents["extra"], contents)


def read_run(folder: Path) -> dict[str, Any]:
    """Contents of `run.pt`.

    Raises:
        FileNotFoundError, ValueError: see `read_file`.
    """
    contents = read_file(folder / RUN)
    place, files = contents.get("place"), contents.get("files")
    if place not in PLACES or not isinstance(files, dict) or not all(map(SHARD.fullmatch, files)):
        raise ValueError(f"{folder / RUN}: fields 'place' and 'files' must name shards, got {place!r}, {files!r}")
    return contents


def tensors_by_name(contents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of the model and the optimizer, not on the meta device, by their names in the shards."""
    tensors = {f"model.{name}": value for name, value in contents["model"].items()}
    for name, values in contents["optimizer"].items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor) and not value.is_meta}


def _empty_place(folder: Path) -> Path:
    """The subdirectory that `run.pt` does not name, without the shards of an earlier checkpoint."""
    current = None
    with suppress(FileNotFoundError, ValueError):
        current = read_run(folder)["place"]
    place = folder / PLACES[current == PLACES[0]]
    place.mkdir(parents=True, exist_ok=True)
    for file in place.iterdir():
        if SHARD.fullmatch(file.name):
            file.unlink()
    return place


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
