"""Convolution-like attention: every token sees the text before it, and an image token a window of the image.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo.ops.sparse.image_layout import TextImageLayout, check_kernel, conv_mask, reach
from attention_zoo.ops.sparse.pattern import pattern_attention
from attention_zoo.ops.sparse.text_tiles import text_tiles
from attention_zoo.ops.sparse.tiles import Tile, define_tiled_op

STRIP = 32  # queries that a strip of rows should have at least


@dataclass(frozen=True)
class ConvPattern:
    """What `conv_mask` draws, and the ways to compute it.

    Args:
        layout, kernel_size, dilation, window: see `conv_mask`.
    """

    layout: TextImageLayout
    kernel_size: int = 5
    dilation: int = 1
    window: str = "quadrant"

    def __post_init__(self) -> None:
        check_kernel(self.kernel_size, self.dilation, self.window)

    def check(self, tokens: int, *, name: str) -> None:
        self.layout.check(tokens, name=name)

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        return conv_mask(
            self.layout,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            window=self.window,
            start=start,
            stop=stop,
            device=device,
        )

    def keys(self, position: int) -> list[slice | list[int]]:
        text, width = self.layout.text_len, self.layout.width
        if position < text:
            return [slice(0, position + 1)]
        row, column = divmod(position - text, width)
        side = (self.kernel_size - 1) * self.dilation
        left, right = (side, 0) if self.window == "quadrant" else (side // 2, side // 2)
        above = reach(self.kernel_size, self.dilation, self.window)
        near = [
            text + r * width + c
            for r in range(row - above, row + 1, self.dilation)
            for c in range(column - left, column + right + 1, self.dilation)
            if r >= 0 and 0 <= c < width and (r < row or c <= column)
        ]
        return [slice(0, text), near]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        layout = self.layout
        numbers = [layout.text_len, layout.height, layout.width]
        numbers += [self.kernel_size, self.dilation, int(self.window == "quadrant")]
        return _conv_op(q, k, v, mask, None, numbers)[0]


def conv_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TextImageLayout,
    kernel_size: int = 5,
    dilation: int = 1,
    window: str = "quadrant",
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `conv_mask`.

    The window of a strip of rows lies in the run of keys from the first row that it reaches to its own last: one tile
    per strip beside one for the text. Time O(n (text + kernel_size dilation width)), memory O(n).

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e), a prefix of the layout.
        layout, kernel_size, dilation, window: see `conv_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query that sees no key gets exactly 0, and gives zero gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    pattern = ConvPattern(layout, kernel_size, dilation, window)
    return pattern_attention(pattern, q, k, v, mask=mask, dropout=dropout, impl=impl)


def conv_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Text, and strips of rows; each strip's keys begin with the first row that its window reaches."""
    text, _, width, kernel_size, dilation, quadrant = numbers
    window = "quadrant" if quadrant else "causal"
    above = reach(kernel_size, dilation, window)
    tall = max(1, STRIP // width)
    strip = TextImageLayout(0, above + tall, width)  # a strip below all the rows that it reaches
    seen = conv_mask(
        strip, kernel_size=kernel_size, dilation=dilation, window=window, start=above * width, device=device
    )
    tiles = text_tiles(n, text, device)
    for first in range(text, n, tall * width):
        stop = min(first + tall * width, n)
        begin = max(text, first - above * width)
        missing = above * width - (first - begin)  # keys above the image's first row
        cut = seen[: stop - first, missing : missing + stop - begin]
        tiles.append(Tile(slice(first, stop), slice(begin, stop), cut, more=text > 0))
    return tiles


_conv_op = define_tiled_op("conv_attention", conv_tiles)
