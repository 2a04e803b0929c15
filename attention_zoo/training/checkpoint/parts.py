"""The parts of a training run, as checkpoints of every kind hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence, Sized
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from attention_zoo._files import write_aside


def write_contents(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a file of torch.save, which is replaced only by a whole one.

    Raises:
        OSError: the disk is full, say.
    """

    def write(aside: str) -> None:
        try:
            torch.save(contents, aside)
        except RuntimeError as error:  # as torch's own writer says that it could not write
            raise OSError(f"{path} could not be written: {str(error).splitlines()[0]}") from error

    write_aside(path, write)


def random_states() -> dict[str, Any]:
    """The states of torch's own generators in this process."""
    # Asking a device that was never used would start it.
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no type there
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if used else []}


def set_random_states(states: Sequence[Mapping[str, Any]], rank: int) -> None:
    """Put torch's own generators back where they were in the process of this rank.

    A process that had no predecessor starts them anew: it must not draw the same dropout as another.
    """
    mine = states[rank if rank < len(states) else 0]
    torch.set_rng_state(mine["cpu"])
    # A machine with fewer devices than the old one goes on with those that it has.
    for device, state in enumerate(mine["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    if rank >= len(states):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)


def part(owner: object, state: object) -> dict[str, object]:
    """A part of a run as a checkpoint holds it: its state, and of what class it is."""
    return {"class": type(owner).__name__, "state": state}


def pack(
    optimizer: Optimizer,
    state: object,
    schedule: LRScheduler | None,
    generator: torch.Generator | None,
    random: object,
    extra: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint of any kind holds beside the model.

    Args:
        state: of the optimizer, as this kind of checkpoint keeps it.
        random: the states of torch's own generators, of one process or of all.
    """
    return {
        "optimizer": part(optimizer, state),
        "schedule": None if schedule is None else part(schedule, schedule.state_dict()),
        "generator": None if generator is None else part(generator, generator.get_state()),
        "random": random,
        "extra": dict(extra or {}),
    }


def check_parts(
    path: Path,
    contents: Mapping[str, Any],
    random: Sequence[Mapping[str, Any]],
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    generator: torch.Generator | None,
) -> None:
    """A run must have the parts that were saved, and the states of random generators must be such.

    Raises:
        ValueError: naming the field.
    """
    check_part(path, contents, "optimizer", optimizer)
    check_part(path, contents, "schedule", schedule)
    check_part(path, contents, "generator", generator)
    if generator is not None:
        check_states(path, "generator", contents["generator"]["state"], generator.get_state())
    for states in random:
        check_states(path, "random", states["cpu"], torch.get_rng_state())


def check_weights(where: str, model: nn.Module, found: Mapping[str, str]) -> None:
    """What was saved must be tensors of the names, dtypes and shapes of this model.

    Args:
        where: how a message begins.
        found: what was saved, as `describe` describes it.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    wanted = {name: describe(tensor) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{where} lacks {name!r}, which this model has")
        if name not in wanted:
            raise ValueError(f"{where} holds {name!r}, which this model has not")
        if wanted[name] != found[name]:
            raise ValueError(f"{where} must hold {wanted[name]} as {name!r}, got {found[name]}")


def check_group_sizes(path: Path, want: Sequence[Sized], got: Sequence[Sized]) -> None:
    """An optimizer's groups must have as many parameters as those that were saved.

    Raises:
        ValueError: they have not.
    """
    sizes = [len(group) for group in want], [len(group) for group in got]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{path}: field 'optimizer' must have groups of {sizes[0]} parameters, got {sizes[1]}")


def check_part(path: Path, contents: Mapping[str, Any], field: str, owner: object) -> None:
    """Each optional part is there in both or in neither, and of one class.

    Raises:
        ValueError: naming the field.
    """
    saved = contents[field]
    want = "none" if owner is None else type(owner).__name__
    got = "none" if saved is None else saved["class"]
    if want != got:
        raise ValueError(f"{path}: field {field!r} must hold the state of {want}, got that of {got}")


def describe(value: object) -> str:
    """A tensor's dtype and shape, or a value's type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_plain(what: str, value: object) -> None:
    """Refuse now what reading would refuse when the run is long over.

    Raises:
        TypeError: naming it.
    """
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor):
        return
    if type(value) in (list, tuple):
        for item in cast(Sequence[object], value):
            check_plain(what, item)
        return
    if type(value) is dict:
        for key, item in value.items():
            check_plain(what, key)
            check_plain(what, item)
        return
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickle raises whatever the value's own methods do
        raise TypeError(f"{what} must be made of numbers, strings, lists, dicts and tensors, got {value!r}") from error


def check_run(step: int, extra: Mapping[str, Any] | None, optimizer: Optimizer, schedule: LRScheduler | None) -> None:
    """Refuse a run of which a part could be written, and not read again.

    Raises:
        TypeError: naming the part.
    """
    if type(step) is not int or step < 0:
        raise TypeError(f"step must be an int of at least 0, got {step!r}")
    for name, value in (extra or {}).items():
        check_plain(f"extra[{name!r}]", value)
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                check_plain(f"optimizer's {name}", value)
    for state in optimizer.state.values():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                check_plain(f"optimizer's state {name!r}", value)
    if schedule is not None:
        check_plain("schedule's state", schedule.state_dict())


def load_schedule(path: Path, schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Give a schedule its state.

    Raises:
        ValueError: it is that of another one.
    """
    own = schedule.state_dict()
    missing = sorted(own.keys() ^ state.keys())
    parts = len(own.get("_schedulers", ())), len(state.get("_schedulers", ()))
    if missing or parts[0] != parts[1]:
        what = f"the same entries, not {missing}" if missing else f"the state of {parts[0]} schedules, got {parts[1]}"
        raise ValueError(f"{path}: field 'schedule' must have {what}")
    try:
        schedule.load_state_dict(deepcopy(dict(state)))  # it may keep what it is given, and change it
    except Exception as error:  # whatever a schedule makes of a state that is not its own
        raise ValueError(f"{path}: field 'schedule' must hold a state of {type(schedule).__name__}") from error


def check_states(path: Path, field: str, got: object, want: Tensor) -> None:
    """The state of a random generator is a tensor of one form.

    Raises:
        ValueError: naming the field.
    """
    if describe(got) != describe(want):
        raise ValueError(f"{path}: field {field!r} must hold a state of {describe(want)}, got {describe(got)}")
