"""Assertions of the checks: their messages say what differs, where and by how much."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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


def gradients(block: nn.Module, total: Tensor, x: Tensor | None = None) -> dict[str, Tensor]:
    """The gradients of a scalar with respect to x and every parameter of the block, by name."""
    leaves = {} if x is None else {"x": x}
    leaves |= {name: p for name, p in block.named_parameters() if p.requires_grad}
    if not total.requires_grad or not leaves:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(total, [*leaves.values()], materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def expect_gradients_close(got: Mapping[str, Tensor], want: Mapping[str, Tensor], limit: float, what: str) -> None:
    """Raise AssertionError unless all gradients agree; `{}` in the message becomes the name of one that does not.

    Errors are relative to the largest gradient: one that cancels to almost 0 has no significant digits.
    """
    size = max((float(gradient.double().norm()) for gradient in want.values()), default=0.0)
    for name, gradient in want.items():
        scale = max(float(gradient.double().norm()), 1e-2 * size, 1e-30)
        error = float((got[name].double() - gradient.double()).norm()) / scale
        expect(error <= limit, f"{what.format(name)}: relative error {error:.2g} exceeds {limit:.2g}")


def one_line(error: Exception, limit: int = 300) -> str:
    """The message of an error in one line, cut between words where it is longer than `limit` characters."""
    return textwrap.shorten(str(error), limit, placeholder=" ...")


def _largest(gap: Tensor) -> tuple[int, ...]:
    """Index of the largest element; NaN counts as the largest."""
    return tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
