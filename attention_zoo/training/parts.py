"""The parts of a training run, as checkpoints of every kind hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def check_extra(name: str, value: object) -> None:
    """Refuse now what reading would refuse when the run is long over.

    Raises:
        TypeError: naming it.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:  # pickle raises whatever the value's own methods do
        raise TypeError(
            f"extra[{name!r}] must be made of numbers, strings, lists, dicts and tensors, got {value!r}"
        ) from error
