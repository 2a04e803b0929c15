"""Which implementation of an operation runs: the reference, or a fast one that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


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
