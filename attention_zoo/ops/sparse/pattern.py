"""Attention patterns: which keys each query of a sequence may attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from attention_zoo._checks import check_boolean
from attention_zoo.ops.masks import causal_mask


@dataclass(frozen=True)
class Pattern:
    """Which keys each query of a sequence may attend to.

    A subclass implements `check` and `attends`, or `mask` in place of `attends`. One with fast implementations sets
    `has_tiles` and implements `tiled` and `keys` as well.

    Attributes:
        has_tiles: whether `tiled` and `keys` are implemented.
        has_text: whether some tokens attend to, or are attended to by, all tokens.
    """

    has_tiles: ClassVar[bool] = False
    sees_itself: ClassVar[bool] = False  # whether every query attends to the key at its own position

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later key."""
        return True

    @property
    def has_text(self) -> bool:
        return True

    def longest(self) -> int | None:
        """Number of tokens of the longest sequence. None: there is none, and masks are built at every call."""
        return None

    def check(self, tokens: int, *, name: str) -> None:
        """Check the length of a sequence.

        Raises:
            ValueError: the pattern is defined for fewer tokens; the message starts with `name`.
        """
        raise NotImplementedError

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        """The definition of the pattern: whether a query may attend to a key.

        Args:
            query, key: indices of tokens that broadcast to each other, on the device of the pattern's table, if any.

        Returns:
            bool, of their common shape.
        """
        raise NotImplementedError

    def mask(self, start: int, stop: int, device: torch.device | None) -> Tensor:
        """Which keys the queries start ... stop - 1 of a sequence may attend to.

        Returns:
            (stop - start, stop) bool, True where the query (row) may attend to the key (column).
        """
        pattern = self.to(device)
        key = torch.arange(stop, device=device)
        return pattern.attends(key[start:, None], key)

    def to(self, device: torch.device | None) -> Pattern:
        """The pattern with its tables on a device."""
        tables = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if device is None or all(table.device == device for table in tables.values()):
            return self
        return replace(self, **{name: table.to(device) for name, table in tables.items()})

    def keys(self, position: int) -> list[slice | list[int]]:
        """The keys of the query at `position`, the last of its sequence, as slices and lists of indices."""
        raise NotImplementedError

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a whole sequence by tiles: q, k, v (b, h, n, e), mask (b, n) bool or None -> (b, h, n, e)."""
        raise NotImplementedError

    def folds(self, tokens: int) -> bool:
        """Whether `folded` is implemented for a sequence of `tokens` tokens."""
        return False

    def folded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """As `tiled`, by a fixed number of operations on folded batches; k, v may have fewer heads."""
        raise NotImplementedError


@dataclass(frozen=True)
class MaskPattern(Pattern):
    """Pattern given as a table of pairs. It has no tiles: attention under it is dense.

    Args:
        allowed: (N, N) bool, True where query i (row) may attend to key j (column), for sequences of up to N tokens.
        causal: whether `allowed` is combined with causal masking.

    Raises:
        TypeError: `allowed` is not a boolean tensor.
        ValueError: `allowed` is not square.
    """

    allowed: Tensor
    causal: bool = False

    def __post_init__(self) -> None:
        check_table("allowed", self.allowed)

    @property
    def is_causal(self) -> bool:
        return self.causal

    def longest(self) -> int:
        return len(self.allowed)

    def check(self, tokens: int, *, name: str) -> None:
        if tokens > len(self.allowed):
            raise ValueError(f"{name} must fit the pattern of {len(self.allowed)} tokens, got {tokens} tokens")

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        allowed = self.allowed[query, key]
        return allowed & (key <= query) if self.causal else allowed

    def mask(self, start: int, stop: int, device: torch.device | None) -> Tensor:
        allowed = self.allowed[start:stop, :stop].to(device)  # faster than `attends`, which gathers every pair
        return allowed & causal_mask(stop - start, stop, device=device) if self.causal else allowed


def check_table(name: str, table: Tensor) -> None:
    """Check that `table` is a square boolean matrix.

    Raises:
        TypeError: `table` is not a boolean tensor.
        ValueError: `table` is not square.
    """
    check_boolean(**{name: table})
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"{name} must be square, (N, N), got shape {tuple(table.shape)}")
