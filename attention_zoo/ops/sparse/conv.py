"""Convolution-like pattern: image tokens attend to the text and to a window of the image.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_flag, check_instance, check_int
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import Pattern
from attention_zoo.ops.sparse.tiles import Tile, strip_tiles, tiled_operator

WINDOWS = ("quadrant", "causal", "wrapped", "centred")


def conv_mask(
    layout: TextImageLayout,
    *,
    kernel_size: int = 5,
    dilation: int = 1,
    window: str | None = None,
    causal: bool = True,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask of convolution-like attention: all text, and in the image a window of the query.

    The windows "quadrant", "causal", "wrapped" and "centred" for kernel_size=3 (x the query, o the other keys it
    attends to):

        o o o . .      . o o o .      . o o o .      . o o o .
        o o o . .      . o x . .      . o x . .      . o x o .
        o o x . .      . . . . .      . . . . .      . o o o .

    and for queries in the first column, where the columns of "wrapped" continue in the rows before:

        o . . . .      . . . . .      . . . . o      . . . . .
        o . . . .      o o . . .      o o . . o      o o . . .
        x . . . .      x . . . .      x . . . .      x o . . .
        . . . . .      . . . . .      . . . . .      o o . . .

    Args:
        layout: geometry of the sequence.
        kernel_size: odd. "quadrant" is kernel_size wide and high. The other windows are the kernel centred on the
            query: without the keys after it in "causal" and "wrapped", whole in "centred".
        dilation: distance between neighbouring rows and columns of the window.
        window: "quadrant", "causal" or "wrapped" with causal masking, "centred" without. Default: "quadrant" with,
            "centred" without.
        causal: causal masking. Without it, text attends to all tokens.
        start, stop: range of the queries; stop is also the number of keys. None: the whole sequence.
        device: device of the mask.

    Returns:
        (stop - start, stop) bool, True where the query (row) attends to the key (column).

    Raises:
        TypeError: `layout` is not a TextImageLayout, a size is not an int, or `causal` is not a bool.
        ValueError: `kernel_size` is even, a size is below 1, `window` is unknown or does not fit `causal`, or `stop`
            exceeds the layout.
    """
    pattern = ConvPattern(layout, kernel_size, dilation, window, causal)
    stop = layout.length if stop is None else stop
    pattern.check(stop, name="stop")
    return pattern.mask(start, stop, device)


@dataclass(frozen=True)
class ConvPattern(Pattern):
    """The pattern of `conv_mask`.

    Args:
        layout, kernel_size, dilation, window, causal: see `conv_mask`.
    """

    has_tiles = True
    sees_itself = True

    layout: TextImageLayout
    kernel_size: int = 5
    dilation: int = 1
    window: str | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        check_instance(TextImageLayout, layout=self.layout)
        check_int(1, kernel_size=self.kernel_size, dilation=self.dilation)
        check_flag(causal=self.causal)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got kernel_size={self.kernel_size}")
        if self.window is None:
            object.__setattr__(self, "window", "quadrant" if self.causal else "centred")
        check_choice("window", self.window, WINDOWS)
        if self.causal == (self.window == "centred"):
            rule = "must not be 'centred' with causal=True" if self.causal else "must be 'centred' with causal=False"
            raise ValueError(f"window {rule}, got window={self.window!r}")

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def has_text(self) -> bool:
        return self.layout.text_len > 0

    @property
    def reach(self) -> int:
        """Number of rows, and of columns, from the query to the end of its window."""
        return (self.kernel_size - 1) * self.dilation // (1 if self.window == "quadrant" else 2)

    def longest(self) -> int:
        return self.layout.length

    def check(self, tokens: int, *, name: str) -> None:
        self.layout.check(tokens, name=name)

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        reach, step, width = self.reach, self.dilation, self.layout.width
        if self.window == "wrapped":
            back = query - key
            near = torch.zeros_like(back, dtype=torch.bool)
            for column in range(-reach, reach + 1, step):
                rows = back - column  # as a multiple of the width
                near = near | ((rows % (step * width) == 0) & (rows.abs() <= reach * width))
        else:
            down, right = self.layout.offsets(query, key)
            if self.window == "quadrant":
                near = (down >= 0) & (down <= reach) & (right >= 0) & (right <= reach)
            else:
                near = (down.abs() <= reach) & (right.abs() <= reach)
            near = near & (down % step == 0) & (right % step == 0)
        return self.layout.add_text(near, query, key, causal=self.causal)

    def keys(self, position: int) -> list[slice | list[int]]:
        text, width = self.layout.text_len, self.layout.width
        if position < text:
            return [slice(0, position + 1)]
        row, column = divmod(position - text, width)
        reach, step = self.reach, self.dilation
        rows = range(row - reach, row + 1, step)
        columns = range(column - reach, column + (1 if self.window == "quadrant" else reach + 1), step)
        if self.window == "wrapped":
            places = sorted({text + r * width + c for r in rows for c in columns})
        else:
            places = [text + r * width + c for r in rows for c in columns if r >= 0 and 0 <= c < width]
        return [slice(0, text), [place for place in places if text <= place <= position]]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        numbers = [self.layout.text_len, self.layout.width, self.kernel_size, self.dilation]
        return _tiled_conv(q, k, v, mask, None, [*numbers, WINDOWS.index(str(self.window)), int(self.causal)])


def conv_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Tiles of the text and of strips of image rows, with the rows of their windows."""
    text, width, kernel_size, dilation, window, causal = numbers

    def pattern(rows: int) -> ConvPattern:
        return ConvPattern(TextImageLayout(0, rows, width), kernel_size, dilation, WINDOWS[window], bool(causal))

    reach = pattern(1).reach
    above = reach - (-reach // width if WINDOWS[window] == "wrapped" else 0)
    return strip_tiles(n, text, width, pattern, above=above, below=0 if causal else reach, device=device)


_tiled_conv = tiled_operator("conv_attention", conv_tiles)
