"""Small parts that several blocks and models share."""

from attention_zoo.layers.feedforward import FEEDFORWARDS, GEGLU, FeedForward, SwiGLU
from attention_zoo.layers.memory_update import InitialMemory, MemoryUpdate
from attention_zoo.layers.norms import NORMS, LayerNorm, RMSNorm
from attention_zoo.layers.positions import LearnedPositions, RelativeBias, Rotary
from attention_zoo.layers.projections import Projections
from attention_zoo.layers.residual import RESIDUALS, DeepNorm, PostNorm, PreNorm, Residual, SandwichNorm
from attention_zoo.layers.state import KeyValueState, State, count_tokens, register_state

__all__ = [
    "FEEDFORWARDS",
    "GEGLU",
    "NORMS",
    "RESIDUALS",
    "DeepNorm",
    "FeedForward",
    "InitialMemory",
    "KeyValueState",
    "LayerNorm",
    "LearnedPositions",
    "MemoryUpdate",
    "PostNorm",
    "PreNorm",
    "Projections",
    "RMSNorm",
    "RelativeBias",
    "Residual",
    "Rotary",
    "SandwichNorm",
    "State",
    "SwiGLU",
    "count_tokens",
    "register_state",
]
