"""State of the default random number generators of the CPU and of CUDA devices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def random_state(devices: Iterable[int] | None = None) -> dict[str, Any]:
    """State of the generators of the CPU and of `devices`; None: all CUDA devices, if CUDA is initialized."""
    if devices is None:
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped in torch
        devices = range(torch.cuda.device_count() if initialized else 0)
    return {"cpu": torch.get_rng_state(), "cuda": {device: torch.cuda.get_rng_state(device) for device in devices}}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state of `random_state`, except those of devices that this machine does not have."""
    torch.set_rng_state(state["cpu"])
    for device, cuda_state in state["cuda"].items():
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda_state, device)
