"""Argument checks shared by all packages. A message names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real

import torch
from torch import Tensor, nn

LARGEST = 2**40  # of sizes and other whole numbers
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def check_at_least(minimum: int, /, **sizes: int | None) -> None:
    """Check that sizes are integers of at least `minimum`; None (not given) passes.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below `minimum`.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if not isinstance(size, (Integral, torch.SymInt)) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {name}={size!r}")
        if size < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {name}={size}")
        if size >= LARGEST:
            raise ValueError(f"{name} must be below {LARGEST}, got {name}={size}")


def check_positive(**sizes: int | None) -> None:
    """Check that sizes are positive integers; None (not given) passes.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.
    """
    check_at_least(1, **sizes)


def check_fraction(**fractions: float) -> None:
    """Check that fractions lie in [0, 1).

    Raises:
        ValueError: a fraction is outside [0, 1).
    """
    for name, fraction in fractions.items():
        check_number(**{name: fraction})
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {name}={fraction}")


def check_in(interval: str, /, **numbers: float) -> None:
    """Check that numbers lie in an interval, such as "(0, 1]", without the ends next to round brackets and NaN.

    Raises:
        TypeError: a value is not a number.
        ValueError: a number is outside the interval.
    """
    low, high = map(float, interval[1:-1].split(","))
    for name, number in numbers.items():
        if not isinstance(number, Real) or isinstance(number, bool):
            raise TypeError(f"{name} must be a number, got {name}={number!r}")
        above = number >= low if interval[0] == "[" else number > low
        below = number <= high if interval[-1] == "]" else number < high
        if not (above and below):
            raise ValueError(f"{name} must lie in {interval}, got {name}={number}")


def check_int(minimum: int, /, **numbers: int) -> None:
    """As `check_at_least`, for numbers that must be given: None does not pass.

    Raises:
        TypeError: a number is not an int.
        ValueError: a number is below `minimum`.
    """
    for name, number in numbers.items():
        if number is None:
            raise TypeError(f"{name} must be an int, got {name}=None")
    check_at_least(minimum, **numbers)


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Check that `value` is one of `known`. The error message suggests the closest match.

    Raises:
        ValueError: `value` is not one of `known`.
    """
    known = list(known)
    if value in known:
        return
    near = get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {known}, got {name}={value!r}{hint}")


def check_boolean(**masks: Tensor) -> None:
    """Check that masks are boolean tensors.

    Raises:
        TypeError: a mask is not a boolean tensor.
    """
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a boolean tensor, got {_type_of(mask)}")


def check_integers(**tensors: Tensor) -> None:
    """Check that tensors are of an integer dtype.

    Raises:
        TypeError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS:
            raise TypeError(f"{name} must be an integer tensor, got {_type_of(tensor)}")


def check_floats(**tensors: Tensor) -> None:
    """Check that tensors are dense and of a floating point dtype.

    Raises:
        TypeError: one is not.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a floating point tensor, got {_type_of(tensor)}")


def check_features(x: Tensor, dim: int, *, name: str = "x") -> None:
    """Check that the input of a layer is (b, n, dim) with n >= 1.

    Raises:
        TypeError: `x` is not a dense floating point tensor.
        ValueError: `x` has another shape, or no token.
    """
    check_floats(**{name: x})
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"{name} must be (b, n, dim) with {dim=}, got shape {tuple(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one token, got shape {tuple(x.shape)}")


def check_padding(mask: Tensor | None, x: Tensor, *, name: str = "mask") -> None:
    """Check that a padding mask is None or a boolean tensor (b, n), for x (b, n, ...).

    Raises:
        TypeError: `mask` is not a boolean tensor.
        ValueError: `mask` has another shape.
    """
    if mask is None:
        return
    check_boolean(**{name: mask})
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{name} must be (b, n) = {tuple(x.shape[:2])}, got shape {tuple(mask.shape)}")


def check_position_ids(position_ids: Tensor, x: Tensor) -> None:
    """Check that positions are integers (b, n) on the device of x (b, n, ...).

    Raises:
        TypeError: `position_ids` is not an integer tensor.
        ValueError: it has another shape or device.
    """
    check_integers(position_ids=position_ids)
    if position_ids.shape != x.shape[:2]:
        raise ValueError(f"position_ids must be (b, n) = {tuple(x.shape[:2])}, got shape {tuple(position_ids.shape)}")
    if position_ids.device != x.device:
        raise ValueError(f"position_ids must be on the device of x, {x.device}, got {position_ids.device}")


def check_has_data(module: nn.Module, x: Tensor) -> None:
    """Check that no parameter or buffer is on the meta device unless the input `x` is; not in a compiled function.

    torch's linear operator, given data and a weight on the meta device, returns uninitialised memory (as of 2.13).

    Raises:
        RuntimeError: one is.
    """
    if not torch.compiler.is_compiling() and not x.is_meta and _has_meta(module):
        raise RuntimeError(f"{type(module).__name__} must have its parameters loaded, got some on the meta device")


def _has_meta(module: nn.Module) -> bool:
    # not module.parameters(), which takes four times as long
    for tensors in (module._parameters, module._buffers):
        if any(tensor is not None and tensor.is_meta for tensor in tensors.values()):
            return True
    return any(child is not None and _has_meta(child) for child in module._modules.values())


def check_tokens(
    tokens: Tensor, num_tokens: int, *, name: str = "tokens", minimum: int = 1, limit: str = "num_tokens"
) -> None:
    """Check that token ids are integers (b, n) with n >= minimum, and on the CPU that they are in range.

    `limit` is the name of `num_tokens` in the error message.

    The range is not checked on other devices, where the check would synchronise, nor in a compiled function.

    Raises:
        TypeError: `tokens` is not an integer tensor.
        ValueError: `tokens` has another shape, n is below `minimum`, or an id is outside 0 ... num_tokens - 1.
    """
    check_integers(**{name: tokens})
    if tokens.ndim != 2 or tokens.shape[1] < minimum:
        raise ValueError(f"{name} must be (b, n) with n >= {minimum}, got shape {tuple(tokens.shape)}")
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
        check_token_range(tokens, num_tokens, name=name, limit=limit)


def check_token_range(tokens: Tensor, num_tokens: int, *, name: str = "tokens", limit: str = "num_tokens") -> None:
    """Check that token ids lie in 0 ... num_tokens - 1. Synchronises with the device.

    Raises:
        ValueError: an id is outside 0 ... num_tokens - 1.
    """
    if not tokens.numel():
        return
    # torch 2.13 cannot compare wide unsigned integers
    low, high = (int(end) for end in (tokens if tokens.dtype in SIGNED else tokens.long()).aminmax())
    if low < 0 or high >= num_tokens:
        raise ValueError(f"{name} must lie in 0 ... {limit} - 1 = {num_tokens - 1}, got ids from {low} to {high}")


def _type_of(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"dtype {value.dtype}" if value.layout == torch.strided else f"layout {value.layout}"


def check_flag(**flags: bool) -> None:
    """Check that flags are booleans.

    Raises:
        TypeError: a flag is not a bool.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {name}={flag!r}")


def check_number(**numbers: float) -> None:
    """Check that numbers are real and finite.

    Raises:
        TypeError: a number is not a real number.
        ValueError: a number is infinite or NaN.
    """
    for name, number in numbers.items():
        if not isinstance(number, (Real, torch.SymInt, torch.SymFloat)) or isinstance(number, bool):
            raise TypeError(f"{name} must be a number, got {name}={number!r}")
        try:
            finite = math.isfinite(number)
        except OverflowError as error:
            raise ValueError(f"{name} must be finite, got an int above the largest float") from error
        if not finite:
            raise ValueError(f"{name} must be finite, got {name}={number}")


def check_positive_number(**numbers: float | None) -> None:
    """Check that numbers are finite and positive; None (not given) passes.

    Raises:
        TypeError: a number is not a real number.
        ValueError: a number is infinite, NaN, or not above 0.
    """
    for name, number in numbers.items():
        if number is None:
            continue
        check_number(**{name: number})
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {name}={number}")


def check_instance(*kinds: type, **values: object) -> None:
    """Check that values are instances of one of `kinds`.

    Raises:
        TypeError: a value is of another class.
    """
    for name, value in values.items():
        if not isinstance(value, kinds):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be of type {names}, got {type(value).__name__}")


def check_attn_mask(attn_mask: Tensor | None, x: Tensor, heads: int, keys: int, *, name: str = "attn_mask") -> None:
    """Check that an attention mask is None, or boolean or floating point, (n, j), (b, n, j) or (b, h, n, j).

    Args:
        attn_mask: the mask; b and h may be 1.
        x: (b, n, d), or (b, s, n, d), the input of the layer.
        heads: number of attention maps h.
        keys: number of keys j.

    Raises:
        TypeError: `attn_mask` is neither a boolean nor a floating point tensor.
        ValueError: `attn_mask` has another shape, or is on another device than `x`.
    """
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor) or not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        raise TypeError(f"{name} must be a boolean or floating point tensor, got {_type_of(attn_mask)}")
    batch, queries = x.shape[0], x.shape[-2]
    leading = {2: (), 3: (batch,), 4: (batch, heads)}.get(attn_mask.ndim)
    shape = tuple(attn_mask.shape)
    if (
        leading is None
        or shape[-2:] != (queries, keys)
        or any(got not in (1, want) for got, want in zip(shape, leading, strict=False))
    ):
        raise ValueError(
            f"{name} must be (i, j) = {(queries, keys)}, (b, i, j) or (b, h, i, j) with b = {batch}, h = {heads}, "
            f"got shape {shape}"
        )
    if attn_mask.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {attn_mask.device}")


def is_builtin(module: nn.Module) -> bool:
    """Whether the class of a module is defined in this package."""
    return type(module).__module__.startswith("attention_zoo.")


def check_pair_bias(bias: Tensor, x: Tensor, heads: int, keys: int, *, name: str = "bias") -> None:
    """Check that a bias of every pair is floating point, (h, n, j) or (b, h, n, j).

    Args:
        bias: the bias; b may be 1.
        x: (b, n, d), the input of the layer.
        heads: number of attention maps h.
        keys: number of keys j.

    Raises:
        TypeError: `bias` is not a floating point tensor.
        ValueError: `bias` has another shape, or is on another device than `x`.
    """
    check_floats(**{name: bias})
    want, shape = (heads, x.shape[1], keys), tuple(bias.shape)
    if shape[-3:] != want or bias.ndim not in (3, 4) or (bias.ndim == 4 and shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"{name} must be (h, i, j) = {want} or (b, h, i, j) with b = 1 or {x.shape[0]}, got shape {shape}"
        )
    if bias.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {bias.device}")
