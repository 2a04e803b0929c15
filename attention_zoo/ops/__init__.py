"""Pure functions on tensors: each file holds one idea, its readable reference beside its fast path."""

from attention_zoo.ops.cosine_sim import cosine_sim_attention, l2_normalize
from attention_zoo.ops.implementation import reference
from attention_zoo.ops.losses import masked_cross_entropy, next_token_loss
from attention_zoo.ops.masks import causal_mask, key_mask, visible
from attention_zoo.ops.rotary import rotate
from attention_zoo.ops.softmax import DistanceBias, softmax_attention, softmax_attention_weights
from attention_zoo.ops.sparse.axial import axial_attention
from attention_zoo.ops.sparse.block_sparse import block_sparse_attention, block_sparse_mask, choose_blocks
from attention_zoo.ops.sparse.conv import conv_attention
from attention_zoo.ops.sparse.image_layout import TextImageLayout, axial_mask, conv_mask

__all__ = [
    "DistanceBias",
    "TextImageLayout",
    "axial_attention",
    "axial_mask",
    "block_sparse_attention",
    "block_sparse_mask",
    "causal_mask",
    "choose_blocks",
    "conv_attention",
    "conv_mask",
    "cosine_sim_attention",
    "key_mask",
    "l2_normalize",
    "masked_cross_entropy",
    "next_token_loss",
    "reference",
    "rotate",
    "softmax_attention",
    "softmax_attention_weights",
    "visible",
]
