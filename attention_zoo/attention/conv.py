"""Convolution-like attention: an image token attends to the text and to a window of the image.

Paper: DALL-E, https://arxiv.org/abs/2102.12092
Upstream: DALLE-pytorch, SparseConvCausalAttention.
Differs: from upstream: padding masks apply to every query and key; decoding is cached, for any number of tokens at a
time; height and width may differ; values are not rotated; other windows. The paper's window is "wrapped": it is centred
on the token, and in raster order its columns continue in the neighbouring rows. Windows without causality are ours.
"""

from __future__ import annotations

from attention_zoo._checks import check_flag, check_instance
from attention_zoo.attention.base import ImageAttention
from attention_zoo.layers.positions import RotaryArgument
from attention_zoo.ops.sparse import ConvPattern, TextImageLayout


class ConvAttention(ImageAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the text and a window of the image around i.

    What an image token x attends to with kernel_size=3, window "quadrant", "causal", "wrapped" and "centred":

        o o o . .      . o o o .      . o o o .      . o o o .
        o o o . .      . o x . .      . o x . .      . o x o .
        o o x . .      . . . . .      . . . . .      . o o o .

    and in the first column, where the columns of "wrapped", the window of the paper, continue in the rows before:

        o . . . .      . . . . .      . . . . o      . . . . .
        o . . . .      o o . . .      o o . . o      o o . . .
        x . . . .      x . . . .      x . . . .      x o . . .
        . . . . .      . . . . .      . . . . .      o o . . .

    Time O(n (text + kernel_size * dilation * width) d), memory O(n d); O(n^2) with dropout, and on devices other than
    the CPU, where the full mask is faster. State: keys and values of all tokens; decoding an image token reads
    O(text + kernel_size^2) of them.

    Args:
        dim, heads, dim_head, dropout, rotary, out_bias: see `SelfAttention`.
        layout: number of text tokens and size of the image; the sequence is a prefix of it. For images alone,
            `TextImageLayout(0, height, width)`; `forward` takes them as (b, height, width, d) too. A class token before
            an image is text of length 1.
        kernel_size: width and height of the window, odd.
        dilation: distance of neighbouring rows and columns of the window.
        window: with causal masking "quadrant" (above and left of the token), "causal" (the part of the centred kernel
            before the token) or "wrapped"; without, "centred" (the whole kernel). Default: "quadrant" or "centred".
        causal: causal masking. Without it, text attends to all tokens.

    Raises:
        ValueError: `kernel_size` is even, `window` is unknown or does not fit `causal`, a size is below 1, or the image
            has one row or column; for that `WindowAttention` is faster.

    Example:
        >>> layer = ConvAttention(512, layout=TextImageLayout(0, 14, 14), kernel_size=7, causal=False)
        >>> y = layer(torch.randn(2, 14, 14, 512))
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        kernel_size: int = 5,
        dilation: int = 1,
        window: str | None = None,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryArgument = None,
        out_bias: bool = False,
    ) -> None:
        check_instance(TextImageLayout, layout=layout)
        check_flag(causal=causal)
        if 1 in (layout.height, layout.width) and layout.height != layout.width:  # every token would be a tile
            raise ValueError(
                "layout must have several rows and columns, a window over one of them is that of WindowAttention, got "
                f"{layout}"
            )
        super().__init__(
            dim,
            layout=layout,
            pattern=ConvPattern(layout, kernel_size, dilation, window, causal),
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            rotary=rotary,
            out_bias=out_bias,
        )
