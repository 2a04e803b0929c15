"""Softmax attention over fixed sparse patterns: convolution-like, axial and block-sparse."""

from attention_zoo.ops.sparse.axial import axial_attention
from attention_zoo.ops.sparse.block_sparse import block_sparse_attention, block_sparse_mask, choose_blocks
from attention_zoo.ops.sparse.conv import conv_attention
from attention_zoo.ops.sparse.image_layout import TextImageLayout, axial_mask, conv_mask

__all__ = [
    "TextImageLayout",
    "axial_attention",
    "axial_mask",
    "block_sparse_attention",
    "block_sparse_mask",
    "choose_blocks",
    "conv_attention",
    "conv_mask",
]
