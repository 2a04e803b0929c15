"""Image tokenizers: objects with `num_tokens`, `encode(images) -> ids` and `decode(ids) -> images`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attention_zoo._checks import check_at_least, check_int, check_token_range


class ImageTokenizer(Protocol):
    """Converts images to token ids (b, height * width) in row-major order, and back."""

    @property
    def num_tokens(self) -> int:
        """Number of ids."""

    def encode(self, images: Tensor) -> Tensor:
        """(b, ...) -> (b, height * width) int."""

    def decode(self, ids: Tensor) -> Tensor:
        """(b, height * width) int -> (b, ...)."""


class GreyTokenizer:
    """Grey images with one token per pixel: its brightness in equal steps.

    Args:
        height, width: rows and columns of pixels.
        levels: number of shades of grey, from 0 to 1.
    """

    def __init__(self, *, height: int, width: int, levels: int) -> None:
        check_int(1, height=height, width=width)
        check_at_least(2, levels=levels)
        self.height = height
        self.width = width
        self.num_tokens = levels

    def encode(self, images: Tensor) -> Tensor:
        """(b, height, width) in 0 ... 1 -> (b, height * width) int.

        Raises:
            ValueError: the shape does not fit, or a brightness lies outside 0 ... 1.
        """
        if images.ndim != 3 or images.shape[1:] != (self.height, self.width):
            want = (self.height, self.width)
            raise ValueError(f"images must be (b, height, width) with {want}, got shape {tuple(images.shape)}")
        if images.numel() and not bool((images >= 0).all() & (images <= 1).all()):
            raise ValueError(f"images must lie in 0 ... 1, got {float(images.min()):g} to {float(images.max()):g}")
        return (images.flatten(1) * (self.num_tokens - 1)).round().long()

    def decode(self, ids: Tensor) -> Tensor:
        """(b, height * width) int -> (b, height, width) in 0 ... 1.

        Raises:
            ValueError: the shape does not fit, or an id is out of range.
        """
        if ids.ndim != 2 or ids.shape[1] != self.height * self.width:
            raise ValueError(f"ids must be (b, {self.height * self.width}), got shape {tuple(ids.shape)}")
        check_token_range(ids, self.num_tokens, name="ids")
        return ids.view(-1, self.height, self.width).to(torch.get_default_dtype()) / (self.num_tokens - 1)
