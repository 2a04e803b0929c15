"""Axial attention: an image token sees the text and what precedes it in its row, or in its column.

Papers: Axial Attention, https://arxiv.org/abs/1912.12180; DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseAxialCausalAttention.
Differs: masks are honoured by every query and key; decoding is cached, any number of tokens at a time; height and width
may differ; values are not rotated unless asked for.
"""

from __future__ import annotations

from attention_zoo.attention.base import PatternAttention
from attention_zoo.layers.positions import RotaryEmbedding
from attention_zoo.ops.sparse.axial import AxialPattern
from attention_zoo.ops.sparse.image_layout import TextImageLayout


class AxialAttention(PatternAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text before i, and what precedes i in its row or column.

    What x sees with axis="row" and axis="column":

        . . . . .        . . o . .
        . . . . .        . . o . .
        o o x . .        . . x . .

    Always causal. Time O(n (text + width) d) along rows, O(n (text + height) d) along columns, memory O(n d); with
    dropout O(n^2). State: keys and values of all tokens, of which an image token reads O(text + width or height).

    Args:
        dim: features d of input and output.
        layout: text tokens and size of the image; the sequence is a prefix of it.
        axis: "row" or "column".
        heads: heads h.
        dim_head: features e of each head.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position.
        rotate_values: `rotary` turns the values too, as in old checkpoints.
        out_bias: give the output projection a bias.

    Raises:
        ValueError: an unknown axis, a size below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        axis: str = "row",
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        rotate_values: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            rotate_values=rotate_values,
            out_bias=out_bias,
        )
        self.layout = layout
        self._pattern = AxialPattern(layout, axis)

    def pattern(self) -> AxialPattern:
        return self._pattern

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._pattern}"


class AxialRowAttention(AxialAttention):
    """Axial attention along rows: an image token sees the text and what precedes it in its row.

    `AxialAttention` with axis="row"; the other arguments are the same.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        rotate_values: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            layout=layout,
            axis="row",
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            rotate_values=rotate_values,
            out_bias=out_bias,
        )


class AxialColumnAttention(AxialAttention):
    """Axial attention along columns: an image token sees the text and what precedes it in its column.

    `AxialAttention` with axis="column"; the other arguments are the same.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        rotate_values: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            layout=layout,
            axis="column",
            heads=heads,
            dim_head=dim_head,
            dropout=dropout,
            rotary=rotary,
            rotate_values=rotate_values,
            out_bias=out_bias,
        )
