"""Operations on tensors, each with a readable reference and fast implementations that equal it.

An operation is a folder: `__init__.py` holds the public functions and chooses the implementation, `reference.py` the
equation, and the other files the fast implementations and what they share. `attention_zoo.ops.gate_loop` is both a
package and a function: import names from it (`from attention_zoo.ops.gate_loop import ...`).
"""

from attention_zoo.ops.cosine_sim import cosine_sim_attention, l2_normalize
from attention_zoo.ops.gate_loop import channel_gate_loop, gate_loop, linear_recurrence, unit_gate
from attention_zoo.ops.implementation import reference
from attention_zoo.ops.losses import masked_cross_entropy, next_token_loss
from attention_zoo.ops.masks import causal_mask, key_mask, visible
from attention_zoo.ops.relative_gate import relative_gate_attention
from attention_zoo.ops.rotary import rotate
from attention_zoo.ops.softmax import DistanceBias, softmax_attention, softmax_attention_weights
from attention_zoo.ops.sparse import (
    AxialPattern,
    BlockSparsePattern,
    ConvPattern,
    MaskPattern,
    TextImageLayout,
    axial_attention,
    axial_mask,
    block_sparse_attention,
    block_sparse_mask,
    choose_blocks,
    conv_attention,
    conv_mask,
    pattern_attention,
)
from attention_zoo.ops.talking_heads import HeadMLP, stream_diversity_loss, talking_heads_attention
from attention_zoo.ops.window import window_attention, window_mask

__all__ = [
    "AxialPattern",
    "BlockSparsePattern",
    "ConvPattern",
    "DistanceBias",
    "HeadMLP",
    "MaskPattern",
    "TextImageLayout",
    "axial_attention",
    "axial_mask",
    "block_sparse_attention",
    "block_sparse_mask",
    "causal_mask",
    "channel_gate_loop",
    "choose_blocks",
    "conv_attention",
    "conv_mask",
    "cosine_sim_attention",
    "gate_loop",
    "key_mask",
    "l2_normalize",
    "linear_recurrence",
    "masked_cross_entropy",
    "next_token_loss",
    "pattern_attention",
    "reference",
    "relative_gate_attention",
    "rotate",
    "softmax_attention",
    "softmax_attention_weights",
    "stream_diversity_loss",
    "talking_heads_attention",
    "unit_gate",
    "visible",
    "window_attention",
    "window_mask",
]
