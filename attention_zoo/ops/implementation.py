"""Which implementation of an op runs: its readable reference or a fast path that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

# A plain module-level flag, because torch.compile guards on one and cannot trace a ContextVar.
_reference_forced = False


@contextmanager
def reference() -> Iterator[None]:
    """Run every op of the library by its reference inside this context.

    References are short, follow the paper, work in any floating dtype and are twice differentiable, so this is the
    mode for `gradgradcheck`, for debugging and for devices on which a fast path fails.

    The switch is one flag of the process: threads share it.

    Example:
        >>> with attention_zoo.reference():
        ...     slow = block(x)
    """
    global _reference_forced
    before = _reference_forced
    _reference_forced = True
    try:
        yield
    finally:
        _reference_forced = before


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
    return "reference" if _reference_forced else impl
