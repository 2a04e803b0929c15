"""Arithmetic in at least float32: softmax, norms and recurrences lose too much in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is off for the device of `tensor`, so that a chosen precision stays chosen."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # nothing to switch off, and no time spent on it
        return nullcontext()
    return torch.autocast(device, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged where it is already that precise (float64, complex)."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
