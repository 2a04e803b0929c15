"""A training run in one file, from which it goes on exactly as if it had not been interrupted; and interrupting it."""

from __future__ import annotations

import os
import signal
import time
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from attention_zoo._files import remove_leftovers
from attention_zoo.training.checkpoint.parts import (
    check_group_sizes,
    check_parts,
    check_run,
    check_weights,
    describe,
    load_schedule,
    pack,
    random_states,
    set_random_states,
    write_contents,
)
from attention_zoo.training.distributed import World, is_sharded, scatter_weights, spread

FORMAT = "attention_zoo.training.checkpoint"
VERSION = 1
ECHO = 0.5  # seconds in which a second Ctrl-C is the first again, passed on by a launcher such as torchrun
FIELDS = ("model", "optimizer", "schedule", "generator", "random", "step", "extra")


@dataclass(frozen=True)
class Checkpoint:
    """What `read_checkpoint` found.

    Attributes:
        path: the file.
        step: steps that the run had taken.
        extra: what the caller of `save_checkpoint` added.
        contents: the whole file.
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
        """Put a run back where it was, torch's own random state included, or leave all as it is and say why.

        Args:
            model, optimizer, schedule, generator: built just as for the run that was saved; the model may meanwhile be
                sharded.

        Raises:
            ValueError: something does not fit what was saved; the message names the field.
        """
        found = {name: describe(value) for name, value in self.contents["model"].items()}
        check_weights(f"{self.path}: field 'model'", model, found)
        check_parts(self.path, self.contents, [self.contents["random"]], optimizer, schedule, generator)
        saved = self.contents["optimizer"]["state"]["param_groups"]
        check_group_sizes(
            self.path, [group["params"] for group in optimizer.param_groups], [group["params"] for group in saved]
        )
        if schedule is not None:
            load_schedule(self.path, schedule, self.contents["schedule"]["state"])
        # What is loaded may be kept, and would change with every step.
        state = deepcopy(self.contents["optimizer"]["state"])
        if is_sharded(model):
            scatter_weights(model, self.contents["model"])
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for k, values in state["state"].items():
                state["state"][k] = {
                    name: spread(value, parameters[k]) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
        else:
            model.load_state_dict(self.contents["model"])
        optimizer.load_state_dict(state)
        if generator is not None:
            generator.set_state(self.contents["generator"]["state"])
        set_random_states([self.contents["random"]], World.current().rank)


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
    """Write a training run to one file, which is replaced only by a whole new one.

    A run that is killed at any moment leaves the last whole checkpoint; what it had begun to write beside it is removed
    by the next one.

    Args:
        path: the file; its folder is made where it is missing.
        model, optimizer, schedule: their `state_dict` is written.
        step: steps taken so far.
        generator: the source of randomness of the data. torch's own random state is written without asking.
        extra: what else the run needs: numbers, strings, lists, dicts and tensors by name.

    Raises:
        TypeError: a value of extra is something else, or a setting of the optimizer or the schedule (a number of numpy,
            say, or a path) is; nothing is written then.
        OSError: it could not be written; the last checkpoint is as it was.
    """
    place = Path(path)
    check_run(step, extra, optimizer, schedule)
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.state_dict(),
        "step": step,
        **pack(optimizer, optimizer.state_dict(), schedule, generator, random_states(), extra),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    write_contents(place, contents)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what `save_checkpoint` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or something else than a checkpoint.
    """
    place = Path(path)
    if not place.is_file():
        raise FileNotFoundError(f"{place} does not exist")
    try:
        with zipfile.ZipFile(place) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile("wrong checksum")
        contents = torch.load(place, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can break the readers in any way
        raise ValueError(f"{place} must be a whole checkpoint of a training run, but it cannot be read") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ValueError(f"{place} must be a checkpoint of a training run, but it holds something else")
    if contents.get("version") != VERSION:
        raise ValueError(f"{place}: field 'version' must be {VERSION}, got {contents.get('version')!r}")
    for field in FIELDS:
        if field not in contents:
            raise ValueError(f"{place} must be a whole checkpoint, but the field {field!r} is missing")
    return Checkpoint(place, contents["step"], contents["extra"], contents)


class StopRequest:
    """Ctrl-C within this context asks for a stop instead of causing one; a second Ctrl-C interrupts at once.

    A loop that looks at `made` between two steps stops where a checkpoint is whole: an exception in the midst of a step
    could leave half of the weights updated. To be entered in the main thread, where Python delivers signals.

    Attributes:
        made: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.made = False
        self._since = 0.0

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._make)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _make(self, *_: object) -> None:
        now = time.monotonic()
        if not self.made:
            self.made, self._since = True, now
        elif now - self._since > ECHO:
            signal.signal(signal.SIGINT, self._before)
            signal.raise_signal(signal.SIGINT)
