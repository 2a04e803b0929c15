"""Axial pattern: image tokens attend to the text and to the tokens up to them in their row or column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo._checks import check_choice, check_instance
from attention_zoo.ops.sparse.image_layout import TextImageLayout
from attention_zoo.ops.sparse.pattern import Pattern
from attention_zoo.ops.sparse.tiles import MIN_ROWS, Tile, text_tiles, tiled_operator

AXES = ("row", "column")


def axial_mask(
    layout: TextImageLayout,
    *,
    axis: str = "row",
    start: int = 0,
    stop: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask of axial attention: all earlier text, and in the image the tokens up to the query in its row or column.

    Axis "row" and axis "column" (x the query, o the other keys it attends to):

        . . . . .        . . o . .
        . . . . .        . . o . .
        o o x . .        . . x . .

    Args:
        layout: geometry of the sequence.
        axis: "row" or "column".
        start, stop, device: see `conv_mask`.

    Returns:
        (stop - start, stop) bool, True where the query (row) attends to the key (column).

    Raises:
        TypeError: `layout` is not a TextImageLayout.
        ValueError: `axis` is neither "row" nor "column", or `stop` exceeds the layout.
    """
    check_instance(TextImageLayout, layout=layout)
    check_choice("axis", axis, AXES)
    down, right = layout.offsets(start, stop, device)
    return layout.add_text(down == 0 if axis == "row" else right == 0)


@dataclass(frozen=True)
class AxialPattern(Pattern):
    """The pattern of `axial_mask`.

    Args:
        layout, axis: see `axial_mask`.
    """

    has_tiles = True

    layout: TextImageLayout
    axis: str = "row"

    def __post_init__(self) -> None:
        check_instance(TextImageLayout, layout=self.layout)
        check_choice("axis", self.axis, AXES)

    def check(self, tokens: int, *, name: str) -> None:
        self.layout.check(tokens, name=name)

    def mask(self, start: int, stop: int, device: torch.device) -> Tensor:
        return axial_mask(self.layout, axis=self.axis, start=start, stop=stop, device=device)

    def keys(self, position: int) -> list[slice | list[int]]:
        text, width = self.layout.text_len, self.layout.width
        if position < text:
            return [slice(0, position + 1)]
        row, column = divmod(position - text, width)
        first, step = (text + row * width, 1) if self.axis == "row" else (text + column, width)
        return [slice(0, text), slice(first, position + 1, step)]

    def tiled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        layout = self.layout
        return _tiled_axial(
            q, k, v, mask, None, [layout.text_len, layout.height, layout.width, int(self.axis == "row")]
        )


def axial_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Tiles of the text and of rows (several narrow ones at a time) or columns, which are slices with step `width`."""
    text, height, width, rows = numbers
    tall = max(1, MIN_ROWS // width)
    strip = TextImageLayout(0, tall if rows else height, width if rows else 1)
    allowed = axial_mask(strip, axis="row" if rows else "column", device=device)
    if rows:
        places = [slice(first, min(first + tall * width, n)) for first in range(text, n, tall * width)]
    else:
        places = [slice(first, n, width) for first in range(text, min(text + width, n))]
    tiles = text_tiles(n, text, device)
    for place in places:
        count = len(range(*place.indices(n)))
        tiles.append(Tile(place, place, allowed[:count, :count], merge=text > 0))
    return tiles


_tiled_axial = tiled_operator("axial_attention", axial_tiles)
