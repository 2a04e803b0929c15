"""Checks of arguments that many parts share: each message names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor


def check_positive(**sizes: int | None) -> None:
    """Check that sizes are positive integers; None passes.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.
    """
    check_at_least(1, **sizes)


def check_at_least(minimum: int, /, **sizes: int | None) -> None:
    """Check that sizes are integers not below `minimum`; None passes.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below `minimum`.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {name}={size!r}")
        if size < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {name}={size}")


def check_fraction(**fractions: float) -> None:
    """Refuse a probability outside [0, 1).

    Raises:
        ValueError: it is outside.
    """
    for name, fraction in fractions.items():
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {name}={fraction}")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones, and propose the nearest.

    Raises:
        ValueError: `value` is not one of `known`.
    """
    known = list(known)
    if value in known:
        return
    near = get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {known}, got {name}={value!r}{hint}")


def check_features(x: Tensor, dim: int, *, name: str = "x") -> None:
    """Refuse an input of a block that is not (b, n, dim) with n >= 1.

    Raises:
        TypeError: it is not a floating tensor.
        ValueError: its shape is another.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {got}")
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be (b, n, dim) with {dim=}, got shape {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one token, got shape {tuple(x.shape)}")


def check_padding(mask: Tensor | None, x: Tensor, *, name: str = "mask") -> None:
    """Refuse a padding mask that is not a bool tensor (b, n) beside x (b, n, ...).

    Raises:
        TypeError: it is not boolean.
        ValueError: its shape is another.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a boolean tensor, True = a real token, got {got}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name} must be (b, n) = {tuple(x.shape[:2])}, got shape {tuple(mask.shape)}")


def check_tokens(tokens: Tensor, num_tokens: int, *, name: str = "tokens") -> None:
    """Refuse token ids that an embedding would misread.

    The range is looked at where that costs nothing: eagerly on the CPU.

    Raises:
        TypeError: they are not integers.
        ValueError: they are not (b, n) with n >= 1, or an id is out of range.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = f"dtype {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor of ids, got {got}")
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"{name} must be (b, n) with n >= 1, got shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_token_range(tokens, num_tokens, name=name)


def check_token_range(tokens: Tensor, num_tokens: int, *, name: str = "tokens") -> None:
    """Refuse ids outside 0 ... num_tokens - 1. Waits for the device.

    Raises:
        ValueError: an id is out of range.
    """
    if not tokens.numel():
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= num_tokens:
        raise ValueError(f"{name} must lie in 0 ... num_tokens - 1 = {num_tokens - 1}, got ids from {low} to {high}")
