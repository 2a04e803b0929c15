"""Which implementation of an operation runs: the reference, or a fast one that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from attention_zoo._checks import check_choice


class ReferenceMode:
    """An active `reference()` context.

    Attributes:
        consulted: whether an operation has run its reference because of it.
    """

    consulted = False


# A module-level variable, because torch.compile guards on one and cannot trace a ContextVar.
_active: ReferenceMode | None = None


@contextmanager
def reference() -> Iterator[ReferenceMode]:
    """Run the reference of every operation inside this context.

    References follow the paper's equations, accept any floating point dtype and are twice differentiable: use them for
    `gradgradcheck`, for debugging, and on devices on which a fast implementation fails.

    The context is global to the process, and shared by its threads.

    Example:
        >>> with attention_zoo.reference():
        ...     expected = layer(x)
    """
    global _active
    before = _active
    _active = ReferenceMode()
    try:
        yield _active
    finally:
        _active = before


OPT_IN = ("flex",)  # implementations that have not passed on hardware, which "auto" does not choose by itself
_preferred: str | None = None


@contextmanager
def prefer(impl: str) -> Iterator[None]:
    """Run an opt-in implementation in this context, where an operation has it and can compute the arguments with it.

    Layers call operations with impl="auto", which is `impl` inside this context where that is possible.

    Args:
        impl: "flex", torch's FlexAttention: for sparse patterns and relative position biases. On the CPU it has no
            gradients and is slow.

    The context is global to the process, and shared by its threads.

    Raises:
        ValueError: `impl` is unknown.

    Example:
        >>> with attention_zoo.prefer("flex"):
        ...     loss = model.loss(tokens)
    """
    global _preferred
    check_choice("impl", impl, OPT_IN)
    before = _preferred
    _preferred = impl
    try:
        yield
    finally:
        _preferred = before


def is_preferred(impl: str) -> bool:
    """Whether a `prefer(impl)` context is active."""
    return _preferred == impl


def flex_can_run(*tensors: Tensor | None) -> bool:
    """Whether FlexAttention can compute on these tensors.

    On the CPU, as of torch 2.13, it takes none that requires gradients, inside `torch.no_grad()` either.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return not any(tensor.device.type == "cpu" and tensor.requires_grad for tensor in given)


def in_reference_mode() -> bool:
    """Whether a `reference()` context is active."""
    return _active is not None


def choose(impl: str, known: Sequence[str]) -> str:
    """The implementation to run: `impl`, or "reference" inside `reference()`.

    Args:
        impl: the caller's choice, "auto", "reference" or one of `known`.
        known: names of the operation's fast implementations.

    Raises:
        ValueError: `impl` is unknown.
    """
    if impl not in ("auto", "reference", *known):
        raise ValueError(f"impl must be one of {['auto', 'reference', *known]}, got {impl=}")
    if _active is None:
        return impl
    _active.consulted = True
    return "reference"
