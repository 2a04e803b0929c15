"""Sequences of text followed by an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attention_zoo._checks import check_at_least


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

    def offsets(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns from key up to query, for indices of tokens that broadcast to each other."""
        query, key = query - self.text_len, key - self.text_len
        return query // self.width - key // self.width, query % self.width - key % self.width

    def add_text(self, near: Tensor, query: Tensor, key: Tensor, *, causal: bool) -> Tensor:
        """Whether a query attends to a key: image tokens where `near`, all to the text, and the text to all.

        Args:
            near: bool, of the shape to which `query` and `key` broadcast; read for pairs of image tokens.
            query, key: indices of tokens.
            causal: whether no query attends to a later key.
        """
        near = near | (key < self.text_len)
        return near & (key <= query) if causal else near | (query < self.text_len)

    def flatten(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images (b, height, width, d) as sequences (b, n, d), with their masks; anything else as it is.

        Args:
            x: features.
            mask: (b, height, width) for images, or None.

        Raises:
            ValueError: images are not of this height and width, or there is text before them.
        """
        if not isinstance(x, Tensor) or x.ndim != 4:
            return x, mask
        if self.text_len or x.shape[1:3] != (self.height, self.width):
            want = f"(b, {self.height}, {self.width}, d) without text"
            raise ValueError(f"x must be {want} for images in {self}, got shape {tuple(x.shape)}")
        if isinstance(mask, Tensor) and mask.shape != x.shape[:3]:
            raise ValueError(f"mask must be (b, height, width) = {tuple(x.shape[:3])}, got shape {tuple(mask.shape)}")
        return x.flatten(1, 2), mask.flatten(1) if isinstance(mask, Tensor) else mask
