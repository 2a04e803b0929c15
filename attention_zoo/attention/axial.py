"""Axial attention: an image token attends to the text and to the tokens before it in its row, or in its column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseAxialCausalAttention.
Differs: padding masks apply to every query and key; decoding is cached, for any number of tokens at a time; height and
width may differ; values are not rotated.
"""

from __future__ import annotations

from typing import ClassVar

from attention_zoo._checks import check_instance
from attention_zoo.attention.base import SelfAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.sparse import AxialPattern, TextImageLayout


class AxialAttention(SelfAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text before i and what precedes i in its row or column.

    What an image token x attends to with axis="row" (left) and axis="column" (right):

        . . . . .        . . o . .
        . . . . .        . . o . .
        o o x . .        . . x . .

    Always causal. Time O(n (text + width) d) along rows, O(n (text + height) d) along columns, memory O(n d); O(n^2)
    with dropout. State: keys and values of all tokens; decoding an image token reads O(text + width or height) of them.

    Args:
        dim, heads, dim_head, dropout, rotary, out_bias: see `SelfAttention`.
        layout: number of text tokens and size of the image; the sequence is a prefix of it.
        axis: "row" or "column". Default: the `axis` of the class, "row".

    Raises:
        ValueError: `axis` is neither "row" nor "column", or a size is below 1.
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
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        out_bias: bool = False,
    ) -> None:
        check_instance(TextImageLayout, layout=layout)
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            pattern=AxialPattern(layout, self.axis if axis is None else axis),
            out_bias=out_bias,
        )
        self.layout = layout


class AxialRowAttention(AxialAttention):
    """Axial attention along rows: `AxialAttention` with axis="row"."""


class AxialColumnAttention(AxialAttention):
    """Axial attention along columns: `AxialAttention` with axis="column"."""

    axis = "column"
