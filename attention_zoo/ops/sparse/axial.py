"""Axial pattern: image tokens attend to the text and to the tokens of their row or column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from attention_zoo._checks import check_choice, check_flag, check_instance
from attention_zoo.ops.softmax import softmax_attention
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import Pattern
from attention_zoo.ops.sparse.tiles import Tile, strip_tiles, text_tiles, tiled_operator

AXES = ("row", "column", "wrapped_row")


def axial_mask(
    layout: TextImageLayout,
    *,
    axis: str = "row",
    causal: bool = True,
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask of axial attention: all text, and in the image the tokens of the query's row or column.

    Axis "row", "column" and "wrapped_row" (x the query, o the other keys it attends to):

        . . . . .        . . o . .        . . . . .
        . . . . .        . . o . .        . . o o o
        o o x . .        . . x . .        o o x . .

    "wrapped_row" is the query and the `width` tokens before it in raster order, which wrap over the end of the row.
    Without causal masking "row" and "column" are whole:

        . . . . .        . . o . .
        o o x o o        . . x . .
        . . . . .        . . o . .

    Args:
        layout: geometry of the sequence.
        axis: "row", "column", or "wrapped_row" with causal masking.
        causal: causal masking. Without it, text attends to all tokens.
        start, stop, device: see `conv_mask`.

    Returns:
        (stop - start, stop) bool, True where the query (row) attends to the key (column).

    Raises:
        TypeError: `layout` is not a TextImageLayout, or `causal` is not a bool.
        ValueError: `axis` is unknown or does not fit `causal`, or `stop` exceeds the layout.
    """
    pattern = AxialPattern(layout, axis, causal)
    stop = layout.length if stop is None else stop
    pattern.check(stop, name="stop")
    return pattern.mask(start, stop, device)


@dataclass(frozen=True)
class AxialPattern(Pattern):
    """The pattern of `axial_mask`.

    Args:
        layout, axis, causal: see `axial_mask`.
    """

    has_tiles = True
    sees_itself = True

    layout: TextImageLayout
    axis: str = "row"
    causal: bool = True

    def __post_init__(self) -> None:
        check_instance(TextImageLayout, layout=self.layout)
        check_choice("axis", self.axis, AXES)
        check_flag(causal=self.causal)
        if self.axis == "wrapped_row" and not self.causal:
            raise ValueError(f"axis must be 'row' or 'column' with causal=False, got axis={self.axis!r}")

    @property
    def is_causal(self) -> bool:
        return self.causal

    @property
    def has_text(self) -> bool:
        return self.layout.text_len > 0

    def longest(self) -> int:
        return self.layout.length

    def check(self, tokens: int, *, name: str) -> None:
        self.layout.check(tokens, name=name)

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        if self.axis == "wrapped_row":
            near = query - key <= self.layout.width
        else:
            down, right = self.layout.offsets(query, key)
            near = (down if self.axis == "row" else right) == 0
        return self.layout.add_text(near, query, key, causal=self.causal)

    def keys(self, position: int) -> list[slice | list[int]]:
        text, width = self.layout.text_len, self.layout.width
        if position < text:
            return [slice(0, position + 1)]
        row, column = divmod(position - text, width)
        first = text + {"row": row * width, "column": column, "wrapped_row": max(position - text - width, 0)}[self.axis]
        return [slice(0, text), slice(first, position + 1, width if self.axis == "column" else 1)]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        numbers = [self.layout.text_len, self.layout.height, self.layout.width]
        return _tiled_axial(q, k, v, mask, None, [*numbers, AXES.index(self.axis), int(self.causal)])

    def folds(self, tokens: int) -> bool:
        text, width = self.layout.text_len, self.layout.width
        whole = self.causal or (tokens - text) % width == 0  # causal queries attend to none of the padding of a row
        return self.axis != "wrapped_row" and tokens > text and whole

    def folded(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """The rows or columns as rows of a batch, each after the text, and the text by itself."""
        text, width, n = self.layout.text_len, self.layout.width, q.shape[2]
        image = n - text
        height = -(-image // width)
        lines, axes = (height, "(b r) h c e") if self.axis == "row" else (width, "(b c) h r e")

        def fold(x: Tensor) -> Tensor:
            x = x[:, :, text:]
            if image % width:  # F.pad by nothing copies
                x = F.pad(x, (0, 0, 0, height * width - image))
            return rearrange(x, f"b h (r c) e -> {axes}", c=width)

        def after_text(x: Tensor) -> Tensor:
            return torch.cat((x[:, :, :text].repeat_interleave(lines, 0), fold(x)), dim=2) if text else fold(x)

        keys = None if mask is None else after_text(mask[:, None, :, None])[:, 0, :, 0]
        # bottom-right alignment: a query attends to the text and to its line up to itself
        out = softmax_attention(fold(q), after_text(k), after_text(v), mask=keys, causal=self.causal, dropout=dropout)
        out = rearrange(out, f"{axes} -> b h (r c) e", c=width, r=height)[:, :, :image]
        if not text:
            return out
        seen = text if self.causal else n
        k, v, mask = k[:, :, :seen], v[:, :, :seen], None if mask is None else mask[:, :seen]
        first = softmax_attention(q[:, :, :text], k, v, mask=mask, causal=self.causal, dropout=dropout)
        return torch.cat((first, out), dim=2)


def axial_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Tiles of the text and of strips of rows, or of columns, which are slices with step `width`."""
    text, height, width, axis, causal = numbers
    if AXES[axis] != "column":

        def pattern(rows: int) -> AxialPattern:
            return AxialPattern(TextImageLayout(0, rows, width), AXES[axis], bool(causal))

        above = int(AXES[axis] == "wrapped_row")
        return strip_tiles(n, text, width, pattern, above=above, below=0, device=device)
    allowed = axial_mask(TextImageLayout(0, height, 1), axis="column", causal=bool(causal), device=device)
    tiles = text_tiles(n, text, device, causal=bool(causal))
    for first in range(text, min(text + width, n)):
        place = slice(first, n, width)
        count = len(range(*place.indices(n)))
        tiles.append(Tile(place, place, allowed[:count, :count] if causal else None, merge=text > 0))
    return tiles


_tiled_axial = tiled_operator("axial_attention", axial_tiles)
