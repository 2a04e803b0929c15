"""Axial attention: an image token attends to the text and to the tokens of its row, or of its column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseAxialCausalAttention.
Differs: from upstream: padding masks apply to every query and key; decoding is cached, for any number of tokens at a
time; height and width may differ; values are not rotated. DALL-E's rows are "wrapped_row": the token and the `width`
tokens before it in raster order, across the ends of rows.
"""

from __future__ import annotations

from typing import ClassVar

from attention_zoo._checks import check_flag, check_instance
from attention_zoo.attention.base import ImageAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.sparse import AxialPattern, TextImageLayout


class AxialAttention(ImageAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text and the row or column of i.

    What an image token x attends to with axis="row", "column" and "wrapped_row", the rows of DALL-E:

        . . . . .        . . o . .        . . . . .
        . . . . .        . . o . .        . . o o o
        o o x . .        . . x . .        o o x . .

    and with causal=False:

        . . . . .        . . o . .
        o o x o o        . . x . .
        . . . . .        . . o . .

    Time O(n (text + width) d) along rows, O(n (text + height) d) along columns, memory O(n d); O(n^2) with dropout on
    the CPU. On other devices rows or columns are a batch, each with a copy of the text, O((n + text * height) d) or
    O((n + text * width) d), where "wrapped_row" is dense. State: keys and values of all tokens; decoding an image token
    reads O(text + width or height) of them.

    Args:
        dim, heads, dim_head, dropout, rotary, out_bias: see `SelfAttention`.
        layout: number of text tokens and size of the image; the sequence is a prefix of it. For images alone,
            `TextImageLayout(0, height, width)`; `forward` takes them as (b, height, width, d) too. A class token before
            an image is text of length 1.
        axis: "row", "column", or "wrapped_row" with causal masking. Default: the `axis` of the class, "row".
        causal: causal masking. Without it, text attends to all tokens.

    Raises:
        ValueError: `axis` is unknown or does not fit `causal`, or a size is below 1.

    Example:
        >>> layer = AxialAttention(512, layout=TextImageLayout(0, 14, 14), axis="column", causal=False)
        >>> y = layer(torch.randn(2, 14, 14, 512))
    """

    axis: ClassVar[str] = "row"

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        axis: str | None = None,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        out_bias: bool = False,
    ) -> None:
        check_instance(TextImageLayout, layout=layout)
        check_flag(causal=causal)
        super().__init__(
            dim,
            layout=layout,
            pattern=AxialPattern(layout, self.axis if axis is None else axis, causal),
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            rotary=rotary,
            out_bias=out_bias,
        )


class AxialRowAttention(AxialAttention):
    """Axial attention along rows: `AxialAttention` with axis="row"."""


class AxialColumnAttention(AxialAttention):
    """Axial attention along columns: `AxialAttention` with axis="column"."""

    axis = "column"
