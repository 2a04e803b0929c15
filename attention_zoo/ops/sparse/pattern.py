"""Attention patterns: which keys each query of a sequence may attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attention_zoo._checks import check_boolean
from attention_zoo.ops.masks import causal_mask


@dataclass(frozen=True)
class Pattern:
    """Which keys each query of a sequence may attend to.

    A subclass implements `check` and `mask`. One with fast implementations sets `has_tiles` and implements `tiled` and
    `keys` as well.

    Attributes:
        has_tiles: whether `tiled` and `keys` are implemented.
    """

    has_tiles: ClassVar[bool] = False

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a later key."""
        return True

    def check(self, tokens: int, *, name: str) -> None:
        """Check the length of a sequence.

        Raises:
            ValueError: the pattern is defined for fewer tokens; the message starts with `name`.
        """
        raise NotImplementedError

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        """The definition of the pattern: which keys the queries start ... stop - 1 of a sequence may attend to.

        Returns:
            (stop - start, stop) bool, True where the query (row) may attend to the key (column).
        """
        raise NotImplementedError

    def keys(self, position: int) -> list[slice | list[int]]:
        """The keys of the query at `position`, the last of its sequence, as slices and lists of indices."""
        raise NotImplementedError

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a whole sequence by tiles: q, k, v (b, h, n, e), mask (b, n) bool or None -> (b, h, n, e)."""
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

    def check(self, tokens: int, *, name: str) -> None:
        if tokens > len(self.allowed):
            raise ValueError(f"{name} must fit the pattern of {len(self.allowed)} tokens, got {tokens} tokens")

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        allowed = self.allowed[start:stop, :stop].to(device)
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
