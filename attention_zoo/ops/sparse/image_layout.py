"""Sequences of text followed by an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_at_least
from attention_zoo.ops.masks import causal_mask


@dataclass(frozen=True)
class TextImageLayout:
    """Geometry of a sequence: text tokens, then an image of height x width tokens in row-major order.

    A sequence may be any prefix of it. The index of each token for text_len=3, height=2, width=4:

        text  0 1 2
        image 3 4 5 6
              7 8 9 10

    Args:
        text_len: number of tokens before the image, special tokens included; 0 for an image alone.
        height, width: rows and columns of the image.

    Raises:
        TypeError: a size is not an int.
        ValueError: `height` or `width` is below 1, or `text_len` below 0.
    """

    text_len: int
    height: int
    width: int

    def __post_init__(self) -> None:
        check_at_least(0, text_len=self.text_len)
        check_at_least(1, height=self.height, width=self.width)

    @property
    def image_len(self) -> int:
        """Number of image tokens."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """Number of tokens of the whole sequence."""
        return self.text_len + self.image_len

    def check(self, tokens: int, *, name: str = "x") -> None:
        """Check that a sequence is not longer than text and image.

        Raises:
            ValueError: `tokens` exceeds `length`.
        """
        if tokens > self.length:
            raise ValueError(f"{name} must hold at most the {self.length} tokens of {self}, got {tokens} tokens")

    def rows_and_columns(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of the tokens at these indices, integers. The rows of text tokens are below 0."""
        index = tokens - self.text_len
        return index.div(self.width, rounding_mode="floor"), index % self.width

    def offsets(self, start: int, stop: int | None, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Rows and columns from key up to query, for the queries start ... stop - 1 and the first `stop` keys.

        Args:
            start, stop: range of the queries; stop is also the number of keys. None: `length`.
            device: device of the result.

        Returns:
            Two tensors (stop - start, stop), row of the query minus row of the key and the same for columns.

        Raises:
            ValueError: `stop` exceeds `length`.
        """
        stop = self.length if stop is None else stop
        self.check(stop, name="stop")
        row, column = self.rows_and_columns(torch.arange(stop, device=device))
        return row[start:, None] - row, column[start:, None] - column

    def add_text(self, near: Tensor) -> Tensor:
        """Mask of a causal image pattern: image keys where `near`, all text keys, none after the query.

        Args:
            near: (i, j) bool, for the last i of the first j tokens; modified.
        """
        queries, keys = near.shape
        near[:, : self.text_len] = True
        return near & causal_mask(queries, keys, device=near.device)
