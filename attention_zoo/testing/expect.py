"""Assertions of the checks: their messages say what differs, where and by how much."""

from __future__ import annotations

import textwrap

import torch
from torch import Tensor

FLOAT32_ERROR = 1e-5  # relative 2-norm by which two orders of float32 additions may differ
GRADIENT_ERROR = 1e-4


def expect(condition: object, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` holds; unlike assert also under python -O."""
    if not condition:
        raise AssertionError(message)


def expect_zero(tensor: Tensor, message: str) -> None:
    """Raise AssertionError unless the tensor is exactly 0; `{}` in the message becomes its largest magnitude."""
    size = float(tensor.detach().abs().max())
    expect(size == 0, message.format(f"{size:.2g}"))


def expect_close(got: Tensor, want: Tensor, limit: float, what: str) -> None:
    """Raise AssertionError if the 2-norm of the difference, relative to that of `want`, exceeds `limit` or is NaN."""
    expect(got.shape == want.shape, f"{what}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    gap = (got.detach().double() - want.detach().double()).abs()
    scale = float(want.detach().double().norm())
    error = float(gap.norm()) / (scale or 1.0)
    expect(error <= limit, f"{what}: relative error {error:.2g} exceeds {limit:.2g}, largest at index {_largest(gap)}")


def expect_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError unless two tensors are bitwise equal."""
    if not torch.equal(got, want):
        gap = (got.detach().double() - want.detach().double()).abs()
        raise AssertionError(f"{what}, by up to {float(gap.max()):.2g}, at index {_largest(gap)}")


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of an error in one line, cut between words where it is longer than `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")


def _largest(gap: Tensor) -> tuple[int, ...]:
    """Index of the largest element; NaN counts as the largest."""
    return tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
