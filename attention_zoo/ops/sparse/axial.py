"""Axial attention: every token sees the text before it, and an image token what precedes it in its row or column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_zoo.ops.sparse.image_layout import TextImageLayout, axial_mask, check_axis
from attention_zoo.ops.sparse.pattern import pattern_attention
from attention_zoo.ops.sparse.text_tiles import text_tiles
from attention_zoo.ops.sparse.tiles import Tile, define_tiled_op

STRIP = 32  # queries that a tile of whole rows should have at least


@dataclass(frozen=True)
class AxialPattern:
    """What `axial_mask` draws, and the ways to compute it.

    Args:
        layout, axis: see `axial_mask`.
    """

    layout: TextImageLayout
    axis: str = "row"

    def __post_init__(self) -> None:
        check_axis(self.axis)

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
        numbers = [layout.text_len, layout.height, layout.width, int(self.axis == "row")]
        return _axial_op(q, k, v, mask, None, numbers)[0]


def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TextImageLayout,
    axis: str = "row",
    mask: Tensor | None = None,
    dropout: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """softmax(e^-0.5 q k^T) v under `axial_mask`.

    One tile for the text, and one per row or column, a column being a run of keys with stride `width`. Time O(n (text +
    width)) for rows, O(n (text + height)) for columns, memory O(n).

    Args:
        q: (b, h, i, e), the last i of the j tokens.
        k, v: (b, h, j, e), a prefix of the layout.
        layout, axis: see `axial_mask`.
        mask, dropout, impl: see `pattern_attention`.

    Returns:
        (b, h, i, e). A query that sees no key gets exactly 0, and gives zero gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    return pattern_attention(AxialPattern(layout, axis), q, k, v, mask=mask, dropout=dropout, impl=impl)


def axial_tiles(n: int, numbers: Sequence[int], extra: Tensor | None, device: torch.device) -> list[Tile]:
    """Text, and rows (narrow ones several at a time) or columns."""
    text, height, width, rows = numbers
    tall = max(1, STRIP // width)
    strip = TextImageLayout(0, tall if rows else height, width if rows else 1)
    seen = axial_mask(strip, axis="row" if rows else "column", device=device)
    tiles = text_tiles(n, text, device)
    if rows:
        places = [slice(first, min(first + tall * width, n)) for first in range(text, n, tall * width)]
    else:
        places = [slice(first, n, width) for first in range(text, min(text + width, n))]
    for place in places:
        count = len(range(*place.indices(n)))
        tiles.append(Tile(place, place, seen[:count, :count], more=text > 0))
    return tiles


_axial_op = define_tiled_op("axial_attention", axial_tiles)
