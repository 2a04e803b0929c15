"""Interchangeable attention blocks for PyTorch, every one of them verified."""

from attention_zoo.attention import (
    BLOCKS,
    AttentionBlock,
    CosineSimAttention,
    CrossAttention,
    FullAttention,
    GateLoopAttention,
    RelativeGateAttention,
    SelfAttention,
    SimpleGateLoop,
    TalkingHeadsAttention,
)
from attention_zoo.generation import generate, stream
from attention_zoo.layers import (
    GEGLU,
    FeedForward,
    KeyValueState,
    LayerNorm,
    LearnedPositions,
    MemoryUpdate,
    RelativeBias,
    RMSNorm,
    Rotary,
    State,
    SwiGLU,
)
from attention_zoo.models import (
    LanguageModel,
    Memformer,
    MemoryLanguageModel,
    MultiStreamTransformer,
    Stack,
    cosine_sim_lm,
    gate_loop_lm,
)
from attention_zoo.ops import cosine_sim_attention, reference, softmax_attention

__version__ = "0.1.0"

__all__ = [
    "BLOCKS",
    "GEGLU",
    "AttentionBlock",
    "CosineSimAttention",
    "CrossAttention",
    "FeedForward",
    "FullAttention",
    "GateLoopAttention",
    "KeyValueState",
    "LanguageModel",
    "LayerNorm",
    "LearnedPositions",
    "Memformer",
    "MemoryLanguageModel",
    "MemoryUpdate",
    "MultiStreamTransformer",
    "RMSNorm",
    "RelativeBias",
    "RelativeGateAttention",
    "Rotary",
    "SelfAttention",
    "SimpleGateLoop",
    "Stack",
    "State",
    "SwiGLU",
    "TalkingHeadsAttention",
    "__version__",
    "cosine_sim_attention",
    "cosine_sim_lm",
    "gate_loop_lm",
    "generate",
    "reference",
    "softmax_attention",
    "stream",
]
