"""At least float32 for softmax, norms and recurrences, which lose too much in half precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast is disabled for the device of `tensor`."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # saves the time of entering torch.autocast
        return nullcontext()
    return torch.autocast(device, enabled=False)


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` in float32 if it is float16 or bfloat16, otherwise unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
