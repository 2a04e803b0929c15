"""Which implementation of an op runs: its readable reference or a fast path that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ReferenceMode:
    """Reference mode while it is in force.

    Attributes:
        consulted: whether an op has been run by its reference in it.
    """

    consulted = False


# A plain module-level flag, because torch.compile guards on one and cannot trace a ContextVar.
_forced: ReferenceMode | None = None


@contextmanager
def reference() -> Iterator[ReferenceMode]:
    """Run every op of the library by its reference inside this context.

    References are short, follow the paper, work in any floating dtype and are twice differentiable, so this is the
    mode for `gradgradcheck`, for debugging and for devices on which a fast path fails.

    The switch is one flag of the process: threads share it.

    Example:
        >>> with attention_zoo.reference():
        ...     slow = block(x)
    """
    global _forced
    before = _forced
    _forced = ReferenceMode()
    try:
        yield _forced
    finally:
        _forced = before


def choose(impl: str, known: Sequence[str]) -> str:
    """The implementation to run: `impl`, or the reference where `reference()` is in force.

    Args:
        impl: what the caller asked for, "auto" or one of `known`.
        known: the names that the op has beside "auto" and "reference".

    Raises:
        ValueError: `impl` is none of them.
    """
    if impl not in ("auto", "reference", *known):
        raise ValueError(f"impl must be one of {['auto', 'reference', *known]}, got {impl=}")
    if _forced is None:
        return impl
    _forced.consulted = True
    return "reference"
