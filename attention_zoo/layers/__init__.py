"""Small parts that several blocks and models share."""

from attention_zoo.layers.feedforward import FEEDFORWARDS, GEGLU, FeedForward, SwiGLU
from attention_zoo.layers.norms import NORMS, LayerNorm, RMSNorm
from attention_zoo.layers.positions import LearnedPositions, RelativeBias, Rotary, RotaryEmbedding, TextImageRotary
from attention_zoo.layers.residual import RESIDUALS, DeepNorm, PostNorm, PreNorm, Residual, SandwichNorm
from attention_zoo.layers.state import KeyValueState, State, count_tokens, register_state

__all__ = [
    "FEEDFORWARDS",
    "GEGLU",
    "NORMS",
    "RESIDUALS",
    "DeepNorm",
    "FeedForward",
    "KeyValueState",
    "LayerNorm",
    "LearnedPositions",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "RelativeBias",
    "Residual",
    "Rotary",
    "RotaryEmbedding",
    "SandwichNorm",
    "State",
    "SwiGLU",
    "TextImageRotary",
    "count_tokens",
    "register_state",
]
