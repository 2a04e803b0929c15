"""Convolution-like pattern: image tokens attend to the text and to a window of the image that ends at them.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_instance, check_positive
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import Pattern
from attention_zoo.ops.sparse.tiles import MIN_ROWS, Tile, text_tiles, tiled_operator

WINDOWS = ("quadrant", "causal")


def conv_mask(
    layout: TextImageLayout,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    window: str = "quadrant",
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask of convolution-like attention: all earlier text, and in the image a window that ends at the query.

    The windows "quadrant" and "causal" for kernel_size=3 (x the query, o the other keys it attends to):

        o o o . .        . o o o .
        o o o . .        . o x . .
        o o x . .        . . . . .

    Args:
        layout: geometry of the sequence.
        kernel_size: odd. "quadrant" is kernel_size wide and high; "causal" is the kernel centred on the query, without
            the keys after it.
        dilation: distance between neighbouring rows and columns of the window.
        window: "quadrant" or "causal".
        start, stop: range of the queries; stop is also the number of keys. None: the whole sequence.
        device: device of the mask.

    Returns:
        (stop - start, stop) bool, True where the query (row) attends to the key (column).

    Raises:
        TypeError: `layout` is not a TextImageLayout, or a size is not an int.
        ValueError: `kernel_size` is even, a size is below 1, `window` is unknown, or `stop` exceeds the layout.
    """
    check_instance(TextImageLayout, layout=layout)
    _check_window(kernel_size, dilation, window)
    down, right = layout.offsets(start, stop, device)
    side = (kernel_size - 1) * dilation
    if window == "quadrant":
        near = (down >= 0) & (down <= side) & (right >= 0) & (right <= side)
    else:
        near = (down.abs() <= side // 2) & (right.abs() <= side // 2)
    return layout.add_text(near & (down % dilation == 0) & (right % dilation == 0))


@dataclass(frozen=True)
class ConvPattern(Pattern):
    """The pattern of `conv_mask`.

    Args:
        layout, kernel_size, dilation, window: see `conv_mask`.
    """

    has_tiles = True

    layout: TextImageLayout
    kernel_size: int = 5
    dilation: int = 1
    window: str = "quadrant"

    def __post_init__(self) -> None:
        check_instance(TextImageLayout, layout=self.layout)
        _check_window(self.kernel_size, self.dilation, self.window)

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
        above = _rows_above(self.kernel_size, self.dilation, self.window)
        near = [
            text + r * width + c
            for r in range(row - above, row + 1, self.dilation)
            for c in range(column - left, column + right + 1, self.dilation)
            if r >= 0 and 0 <= c < width and (r < row or c <= column)
        ]
        return [slice(0, text), near]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        numbers = [self.layout.text_len, self.layout.width, self.kernel_size, self.dilation]
        return _tiled_conv(q, k, v, mask, None, [*numbers, int(self.window == "quadrant")])


def conv_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Tiles of the text and of strips of image rows. The keys of a strip start at the first row of its windows."""
    text, width, kernel_size, dilation, quadrant = numbers
    window = "quadrant" if quadrant else "causal"
    above = _rows_above(kernel_size, dilation, window)
    tall = max(1, MIN_ROWS // width)
    strip = TextImageLayout(0, above + tall, width)  # a strip that has all rows of its windows above it
    allowed = conv_mask(
        strip, kernel_size=kernel_size, dilation=dilation, window=window, start=above * width, device=device
    )
    tiles = text_tiles(n, text, device)
    for first in range(text, n, tall * width):
        stop = min(first + tall * width, n)
        begin = max(text, first - above * width)
        missing = above * width - (first - begin)  # keys that would lie above the image
        part = allowed[: stop - first, missing : missing + stop - begin]
        tiles.append(Tile(slice(first, stop), slice(begin, stop), part, merge=text > 0))
    return tiles


def _rows_above(kernel_size: int, dilation: int, window: str) -> int:
    """Number of rows from the first row of the window to the query's."""
    return (kernel_size - 1) * dilation // (1 if window == "quadrant" else 2)


def _check_window(kernel_size: int, dilation: int, window: str) -> None:
    check_positive(kernel_size=kernel_size, dilation=dilation)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size=}")
    check_choice("window", window, WINDOWS)


_tiled_conv = tiled_operator("conv_attention", conv_tiles)
