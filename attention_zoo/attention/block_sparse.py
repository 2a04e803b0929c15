"""Block-sparse attention: blocks of tokens see their neighbourhood, the text, and a few random blocks.

Papers: Sparse Transformer, https://arxiv.org/abs/1904.10509; Big Bird, https://arxiv.org/abs/2007.14062
Upstream: DALLE-pytorch, SparseAttention, over DeepSpeed's VariableSparsityConfig.
Differs: plain torch, on any device; the global blocks are those that hold text, whatever its length; the random blocks
are kept with the weights; masks and cached decoding.
"""

from __future__ import annotations

from torch import Tensor

from attention_zoo._checks import check_positive
from attention_zoo.attention.base import PatternAttention
from attention_zoo.layers.positions import RotaryEmbedding
from attention_zoo.ops.sparse.block_sparse import BlockSparsePattern, choose_blocks
from attention_zoo.ops.sparse.image_layout import TextImageLayout


class BlockSparseAttention(PatternAttention):
    """out_i = sum_j softmax_j(q_i k_j / sqrt(e)) v_j over the tokens j <= i in the blocks that i's block sees.

    Blocks, causal, with local_blocks=2, a global and a random block (g global, l local, r random):

        l
        l l
        g . l
        g r l l
        g . . r l

    Time and reading in proportion to the visible blocks, memory O(n d); with dropout O(n^2). Blocks of 64 pay, blocks
    of 16 do not. State: keys and values of all tokens. The pattern is a buffer, saved with the weights.

    Args:
        dim: features d of input and output.
        layout: text tokens and size of the image; the sequence is a prefix of it.
        block_size: tokens of a block.
        local_blocks: neighbouring blocks that form a group, whose members see each other.
        global_blocks: first blocks, which all see. None: those that hold text.
        random_blocks: columns drawn for every row from all columns; causal, those after the row are lost.
        seed: of the draw.
        causal: hide the future from every token.
        heads: heads h.
        dim_head: features e of each head.
        dropout: probability with which an attention weight is dropped in training.
        rotary: turns queries and keys by their position.
        rotate_values: `rotary` turns the values too, as in old checkpoints.
        out_bias: give the output projection a bias.

    Raises:
        ValueError: a number below its smallest.
    """

    blocks: Tensor

    def __init__(
        self,
        dim: int,
        *,
        layout: TextImageLayout,
        block_size: int = 64,
        local_blocks: int = 4,
        global_blocks: int | None = None,
        random_blocks: int = 4,
        seed: int = 0,
        heads: int = 8,
        dim_head: int = 64,
        causal: bool = True,
        dropout: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        rotate_values: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            causal=causal,
            dropout=dropout,
            rotary=rotary,
            rotate_values=rotate_values,
            out_bias=out_bias,
        )
        check_positive(block_size=block_size)
        self.layout = layout
        self.block_size = block_size
        blocks = choose_blocks(
            -(-layout.length // block_size),
            local_blocks=local_blocks,
            global_blocks=-(-layout.text_len // block_size) if global_blocks is None else global_blocks,
            random_blocks=random_blocks,
            causal=causal,
            seed=seed,
        )
        self.register_buffer("blocks", blocks)

    def pattern(self) -> BlockSparsePattern:
        return BlockSparsePattern(self.blocks, self.block_size, self.causal, self.layout.length)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.layout}, block_size={self.block_size}"
